"""Functions in processes of their own: in order, in time, in their environment, and none left over."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.planning import pool
from maxdiffusion.planning.pool import Pool

ROOT = Path(__file__).parents[2]
LOOK = """[
    __import__('tempfile').gettempdir(), __import__('os').environ.get('PLAN_TEST'), __import__('os').getpid(),
    'jax' in __import__('sys').modules, open(__import__('tempfile').mkdtemp() + '/dump', 'w').close(),
]"""


def run(code: str):
    return functools.partial(exec, code)


def of(seconds: float = 60, **given) -> Pool:
    return Pool({"PLAN_TEST": "here"}, time.monotonic() + seconds, **given)


def test_each_has_a_fresh_process_with_its_environment_and_a_folder_that_goes():
    answers = dict(of(workers=2).map({n: functools.partial(eval, LOOK.replace("\n", "")) for n in range(3)}))
    folders, values, processes, jax, _ = zip(*answers.values(), strict=True)
    assert set(answers) == {0, 1, 2} and set(values) == {"here"} and not any(jax)
    assert len(set(folders)) == len(set(processes)) == 3 and os.getpid() not in processes
    assert not any(Path(folder).exists() for folder in folders)


def test_what_is_late_is_ended_and_what_was_not_begun_is_left():
    begun = time.monotonic()
    answers = dict(of(1, workers=1).map(dict.fromkeys((1, 2), functools.partial(time.sleep, 60))))
    assert answers == {1: None, 2: None} and time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        (run("import os; os.kill(os.getpid(), 9)"), "this machine's memory is full"),
        (run("import os; print('Error: odd', flush=True); os._exit(3)"), "failed with exit code 3: Error: odd."),
        (run("import os; os._exit(3)"), "failed with exit code 3: it said nothing."),
        (run("raise RuntimeError('The TPU is already in use by process 7')"), "libtpu is locked by another process"),
        (run("raise RuntimeError('open(/tmp/libtpu_lockfile)')"), "libtpu is locked by another process"),
        (run("raise OSError(28, 'No space left on device')"), "disk of temporary files full"),
        (run("raise ValueError('odd shape')"), "Compiling failed: ValueError: odd shape."),
    ],
)
def test_a_worker_that_fails_is_one_sentence_and_the_rest_goes_on(job, sentence):
    answers = dict(of().map({1: job, 2: functools.partial(eval, "40 + 2")}))
    assert isinstance(answers[1], UserError) and answers[2] == 42
    assert sentence in str(answers[1]) and "\n" not in str(answers[1])
    with pytest.raises(UserError):
        of().do(job)


def test_no_more_workers_than_memory_allows(monkeypatch):
    monkeypatch.setattr(pool, "available", lambda: 0.5)
    times = functools.partial(eval, "(__import__('time').monotonic(), __import__('time').sleep(0.5))[0]")
    begun = dict(of().map({1: times, 2: times}))
    assert abs(begun[2] - begun[1]) > 0.5


PARENT = """
import functools, signal, sys, time
from maxdiffusion.planning.pool import Pool

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell runs in its background
try:
    list(Pool({}, time.monotonic() + 600, workers=2).map({n: functools.partial(exec, sys.argv[1]) for n in range(2)}))
except KeyboardInterrupt:
    sys.exit(130)
"""
# A worker with a child of its own.
CHILD = """
import json, os, subprocess, tempfile, time
child = subprocess.Popen(["sleep", "600"])
with open(tempfile.gettempdir() + "/begun", "w") as file:
    json.dump([os.getpid(), child.pid], file)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_parent(how, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], env=environment, start_new_session=True)
    try:
        wait(lambda: len(numbers(tmp_path)) == 4)
        processes = numbers(tmp_path)
        parent.send_signal(how)
        assert parent.wait(30) == (130 if how is signal.SIGINT else -how)
    finally:
        parent.kill()
    wait(lambda: not any(map(lives, processes)))
    wait(lambda: not list(tmp_path.iterdir()))


def numbers(folder):
    """Of the workers and their children."""
    files = [file.read_text() for file in folder.glob("plan-*/begun")]
    return [number for text in files if text.endswith("]") for number in json.loads(text)]


def lives(number):
    try:
        return "Z" not in Path(f"/proc/{number}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False


def wait(until):
    for _ in range(600):
        if until():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")
