import os
import pty
import re
import subprocess
import sys
import termios

import pytest

PROGRAM = """
import logging, sys, time
from maxdiffusion.runtime import log, progress
log.setup("info")
bars = progress.make(sys.argv[1])
with bars("load", 3 * 2**20, "bytes") as advance:
    for _ in range(3):
        advance(2**20)
with bars("compile", None, "steps"):
    time.sleep(0.01)
with bars("denoise", 4, "steps") as advance:
    for step in range(4):
        time.sleep(0.12)
        advance(1)
        if step == 1:
            logging.getLogger("maxdiffusion.x").info("a line in between")
with bars("decode", 9, "frames") as advance:
    advance(9)
"""


def run(mode, terminal, columns=100):
    """What the program writes to a stderr that is a terminal or a pipe."""
    if not terminal:
        done = subprocess.run([sys.executable, "-c", PROGRAM, mode], stderr=subprocess.PIPE, check=True, text=True)
        return done.stderr
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24 if columns else 0, columns))
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, mode], stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 4096):
            text += chunk
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert child.wait() == 0
    return text.decode()


def last_states(text):
    """What stays on the terminal: of each line what was written after its last return to the start."""
    return [line.rstrip("\r").rpartition("\r")[2].strip() for line in text.split("\n")]


@pytest.mark.parametrize("columns", [100, 0])  # 0: a terminal that does not know its size
def test_a_terminal_sees_a_bar_for_each_phase(columns):
    text = run("auto", True, columns)
    load, compiled, between, denoise, decode = (line for line in last_states(text) if line)
    assert load.startswith("load") and "100%" in load and "3.00MB/3.00MB" in load and "B/s" in load
    assert compiled.startswith("compile") and "%" not in compiled
    assert between.endswith("a line in between")
    assert denoise.startswith("denoise") and "4/4 steps" in denoise and "s/it" in denoise
    assert decode.startswith("decode") and "9/9 frames" in decode
    assert re.search(r"2/4 steps \[\d\d:\d\d<\d\d:\d\d", text)  # time taken and time left, while it runs


def test_a_pipe_sees_plain_lines():
    text = run("auto", terminal=False)
    assert "\r" not in text and "%" not in text
    lines = [line.split(" ", 1)[1] for line in text.splitlines()]  # without the time of day
    assert lines[0] == "load (3.0 MiB)" and lines[1].startswith("load done in ")
    assert lines[2] == "compile" and lines[3].startswith("compile done in ")
    assert (
        lines[4] == "denoise (4 steps)" and lines[5] == "a line in between" and lines[6].startswith("denoise done in ")
    )
    assert lines[7] == "decode (9 frames)" and len(lines) == 9


@pytest.mark.parametrize("terminal", [True, False])
def test_off_shows_nothing_but_the_log(terminal):
    assert run("off", terminal).strip().endswith("a line in between")
    assert len(run("off", terminal).strip().splitlines()) == 1


def test_on_shows_bars_in_a_pipe():
    assert "4/4 steps" in run("on", terminal=False)
