import datetime
import logging
import os
import pty
import re
import subprocess
import sys
import termios

import pytest

from maxdiffusion.runtime import progress

PROGRAM = """
import logging, sys, time
from maxdiffusion.runtime import log, progress
log.setup("info")
bars = progress.make(sys.argv[1])
with bars("load", 3 * 2**20, "bytes", str) as advance:
    for _ in range(3):
        advance(2**20)
with bars("compile", None, "steps", str):
    time.sleep(0.01)
with bars("denoise", 4, "steps", str) as advance:
    for step in range(4):
        time.sleep(0.12)
        advance(1)
        if step == 1:
            logging.getLogger("maxdiffusion.x").info("a line in between")
with bars("decode", 9, "frames", str) as advance:
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


class Time:
    """A clock that is set by hand."""

    def __init__(self, at):
        self.at = at

    def __call__(self):
        return self.at


def noon():
    return datetime.datetime(2026, 5, 4, 12).timestamp()


def test_the_end_of_the_run_is_told_by_the_seconds_of_its_steps():
    clock = Time(noon())
    outlook = progress.Outlook(clock)
    outlook.expect(denoise=80, decode=162)
    assert outlook.text() == ""
    with outlook.stage("load") as advance:  # not expected, not told
        clock.at += 100
        advance(2**30)
    assert outlook.text() == ""
    with outlook.stage("denoise") as advance:
        for _ in range(40):
            clock.at += 30
            advance(1)
    assert outlook.text() == "denoise done 12:41"  # 1300 s so far, 40 steps of 30 s to come
    clock.at += 20
    with outlook.stage("decode") as advance:
        clock.at += 81
        advance(81)
    assert outlook.text() == "run done 12:44"  # 81 frames of a second more
    with outlook.stage("denoise") as advance:
        clock.at += 1200
        advance(40)
    assert outlook.text() == "run done 12:44"
    with outlook.stage("decode") as advance:
        clock.at += 30
        advance(30)
    assert outlook.text() == ""  # less than a minute


def test_another_day_is_named():
    clock = Time(noon())
    outlook = progress.Outlook(clock)
    outlook.expect(denoise=3)
    with outlook.stage("denoise") as advance:
        clock.at += 8 * 3600
        advance(1)
    assert outlook.text() == "run done Tue 12:00"


def test_a_long_stage_of_a_log_has_a_line_now_and_then(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(logging.getLogger("maxdiffusion"), "propagate", True)
    caplog.set_level("INFO")
    with (tmp_path / "log").open("w") as stream:
        show = progress.make("auto", stream)
        with show("denoise", 2, "steps", lambda: "run done 14:32") as advance:
            advance(1)
            advance(1)
        with show("load vae", 2**21, "bytes", str) as advance:
            advance(2**20)
    assert [message.partition(" in ")[0] for message in caplog.messages] == [
        "denoise (2 steps)",
        "denoise 1 of 2 steps, 0:00:00 left; run done 14:32",
        "denoise done",
        "load vae (2.0 MiB)",
        "load vae 1.0 of 2.0 MiB, 0:00:00 left",
        "load vae done",
    ]


def test_the_bar_tells_the_end_of_the_run(tmp_path):
    with (
        (tmp_path / "bar").open("w") as stream,
        progress.make("on", stream)("denoise", 4, "steps", lambda: "run done 14:32") as advance,
    ):
        advance(1)
    line = (tmp_path / "bar").read_text().splitlines()[-1]
    assert line.rstrip().endswith("run done 14:32]") and len(line) <= 80
