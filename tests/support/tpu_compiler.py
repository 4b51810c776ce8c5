"""Runs code beside libtpu, which compiles for TPUs that are not there; each time in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxdiffusion.hardware.chips import slice_of

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (on x86-64 Linux: pip install libtpu)"
)


def run(topology: str, code: str, *args: object, timeout: int = 600) -> str:
    """What `code` prints; sys.argv is the topology and the arguments."""
    environment = os.environ | slice_of(topology).environment | {"PYTHONPATH": str(ROOT)}
    return command([sys.executable, "-c", code, topology, *map(str, args)], environment, timeout)


def script(topology: str, *words: str, timeout: int = 1800) -> str:
    """What `scripts/tpu.py memory` prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return command([sys.executable, str(ROOT / "scripts" / "tpu.py"), "memory", topology, *words], environment, timeout)


def command(command: list[str], environment: dict[str, str], timeout: int) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
