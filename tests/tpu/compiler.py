"""Runs code beside libtpu, which compiles for TPUs that are not there; each time in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (on x86-64 Linux: pip install libtpu)"
)

# Topology name -> what libtpu calls a machine of it.
KINDS = {
    "v5e:2x4": "v5litepod-8",
    "v6e:2x4": "v6e-8",
    "v5p:2x2x1": "v5p-8",
    "v5p:2x2x2": "v5p-16",
    "TPU7x:2x2x1": "tpu7x-8",
    "TPU7x:2x2x2": "tpu7x-16",
    "v5e:4x4": "v5litepod-16",
    "v6e:4x4": "v6e-16",
    "v5p:2x2x4": "v5p-32",
}


def run(topology: str, code: str, *args: object, timeout: int = 600) -> str:
    """What `code` prints; sys.argv is the topology and the arguments."""
    environment = os.environ | {
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": KINDS[topology],
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "PYTHONPATH": str(ROOT),
    }
    return command([sys.executable, "-c", code, topology, *map(str, args)], environment, timeout)


def script(topology: str, *words: str, timeout: int = 1800) -> str:
    """What scripts/tpu_memory.py prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return command([sys.executable, str(ROOT / "scripts" / "tpu_memory.py"), topology, *words], environment, timeout)


def command(command: list[str], environment: dict[str, str], timeout: int) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
