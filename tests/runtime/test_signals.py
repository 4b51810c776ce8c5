"""A signal while the main thread is in compiled code, which Python hears only once that returns."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUSY = """
import hashlib
from maxdiffusion.runtime import stop

with stop.listening(), stop.deferred():
    with stop.immediate():
        print("busy", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # as a compiler: minutes, without Python
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_it(number):
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout and process.stdout.readline() == "busy\n"
        time.sleep(0.2)
        begun = time.monotonic()
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    assert f"{number.name}: stopped at once" in said and time.monotonic() - begun < 10
