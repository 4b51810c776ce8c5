"""Jobs in processes of their own, here small programs in the worker's place: in order, in time, and none left over."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.planning import pool
from maxdiffusion.planning.pool import Job, Pool

ROOT = Path(__file__).parents[2]
JOB = Job(config={}, stage="text", slice=None, gib=1.0)
ANSWER = """
import sys, tempfile, pathlib
job = sys.stdin.readline()
pathlib.Path(tempfile.mkdtemp(), "dump").touch()
print('{"devices": {"folder": "%s"}}' % tempfile.gettempdir())
"""


def python(program: str, seconds: float = 60) -> Pool:
    return Pool({}, time.monotonic() + seconds, (sys.executable, "-c", program))


def test_answers_come_and_temporary_files_go():
    answers = {}
    python(ANSWER).map({n: JOB for n in range(3)}, answers.__setitem__)
    folders = {answer.devices["folder"] for answer in answers.values()}
    assert sorted(answers) == [0, 1, 2] and len(folders) == 3
    assert not any(Path(folder).exists() for folder in folders)


def test_what_is_late_is_ended_and_what_was_not_begun_is_left(monkeypatch):
    monkeypatch.setattr(pool, "workers", lambda: 1)
    answers, begun = {}, time.monotonic()
    python("import time; time.sleep(60)", seconds=1).map({1: JOB, 2: JOB}, answers.__setitem__)
    assert answers == {1: None, 2: None} and time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "this machine's memory is full"),
        ("raise RuntimeError('The TPU is already in use by process 7')", "libtpu is locked by another process"),
        ("raise RuntimeError('open(/tmp/libtpu_lockfile)')", "libtpu is locked by another process"),
        ("raise OSError(28, 'No space left on device')", "disk of temporary files full"),
        ("raise ValueError('odd shape')", "failed with exit code 1: ValueError: odd shape."),
    ],
)
def test_a_worker_that_fails_is_one_sentence(program, sentence):
    with pytest.raises(UserError) as error:
        python(program).map({1: JOB}, lambda key, answer: None)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_no_more_workers_than_memory_allows(monkeypatch):
    monkeypatch.setattr(pool, "_available", lambda: 0.5)
    assert pool.workers() == 1
    monkeypatch.setattr(pool, "_available", lambda: float("inf"))
    assert pool.workers() == len(os.sched_getaffinity(0))


PARENT = """
import signal, sys, time
from maxdiffusion.planning.pool import Pool
from maxdiffusion.planning.pool import Job

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell runs in its background
pool = Pool({}, time.monotonic() + 600)
pool._command = (sys.executable, "-c", sys.argv[1])
try:
    pool.map({n: Job(config={}, stage="text", slice=None, gib=1.0) for n in range(2)}, print)
except KeyboardInterrupt:
    sys.exit(130)
"""
# The worker's own watch over its parent, and a child of its own.
CHILD = """
import subprocess, sys, tempfile, threading, time
from maxdiffusion.planning import worker

sys.stdin.buffer.readline()
threading.Thread(target=worker._end_with_parent, daemon=True).start()
child = subprocess.Popen(["sleep", "600"])
open(tempfile.gettempdir() + "/begun", "w").write("%d" % child.pid)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_parent(how, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT, textwrap.dedent(CHILD)]
    parent = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        wait(lambda: list(tmp_path.glob("plan-*/begun")))
        (pid, *_) = [int(file.read_text()) for file in tmp_path.glob("plan-*/begun") if file.read_text()]
        parent.send_signal(how)
        assert parent.wait(30) == (130 if how is signal.SIGINT else -how)
    finally:
        parent.kill()
    wait(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    wait(lambda: not list(tmp_path.iterdir()))


def wait(until):
    for _ in range(600):
        if until():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")
