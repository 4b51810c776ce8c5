"""Processes that end in every way, without jax: what the others say, their exit codes, and how soon."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.hosts import free_port

ROOT = Path(__file__).parents[2]
PROCESS = """
import os, signal, sys, time
from maxdiffusion.runtime import peers, rendezvous

index, count, port, how, who = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
peers.watch(index, rendezvous.meet(f"localhost:{port}", count, index, 60))
print("together", flush=True)
if how == "agreed":
    peers.agreed()
    time.sleep(0 if index == who else 3)
    peers.end(2, f"error: {index} in its own time")
if how == "left" and index == who:
    sys.exit(0)
if how == "left":
    while not peers.has_left(who) and index * who == 0:
        time.sleep(0.1)
    sys.exit(0)
try:
    if index == who:
        time.sleep(1)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "refused":
            peers.end(2, "error: a file is absent")
        if how == "stopped":
            peers.end(75, "SIGTERM: stopped after step 3")
        raise ValueError("a bug")
    elif how == "broken":  # what a collective does without its partner
        time.sleep(3.5)
        raise RuntimeError("connection closed by peer")
    time.sleep(60)
except Exception:
    peers.crashed()
"""


def ends(how: str, who: int, count: int = 3) -> tuple[list[int], list[str], float]:
    """Exit codes, what each says on stderr, and the seconds from their meeting to the last end."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, (index, count, port, how, who))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for index in range(count)
    ]
    try:
        for process in started:
            assert process.stdout and process.stdout.readline() == "together\n"
        begun = time.monotonic()
        said = [process.communicate(timeout=60)[1].strip() for process in started]
        return [process.returncode for process in started], said, time.monotonic() - begun
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    ("how", "code", "own", "others"),
    [
        ("refused", 2, "error: a file is absent", "error: process {} of this run failed: a file is absent"),
        ("stopped", 75, "SIGTERM: stopped after step 3", "process {} of this run was stopped: SIGTERM: stopped after"),
        ("raised", 1, "error: ValueError: a bug", "error: process {} of this run failed: ValueError: a bug"),
        ("broken", 1, "error: ValueError: a bug", "error: process {} of this run failed: ValueError: a bug"),
        ("killed", 75, "", "error: process {} of this run ended without a word: it was killed"),
    ],
)
def test_one_ends_all_with_its_code_and_its_sentence(how, code, own, others, who):
    codes, said, seconds = ends(how, who)
    assert codes == [-9 if how == "killed" and index == who else code for index in range(3)], said
    for index, text in enumerate(said):
        assert (own if index == who else others.format(who)) in text
        assert ("Traceback" in text) is (index == who and code == 1), text
    assert said[2].count("error:") <= 1
    assert seconds < 10


def test_an_end_that_all_know_of_leaves_each_its_time():
    codes, said, seconds = ends("agreed", 1)
    assert codes == [2, 2, 2] and said == [f"error: {index} in its own time" for index in range(3)]
    assert 2.9 < seconds < 10


def test_one_that_is_done_ends_nobody():
    codes, said, _ = ends("left", 1)
    assert codes == [0, 0, 0] and said == ["", "", ""]
