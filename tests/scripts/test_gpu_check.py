"""The check of a GPU, with its small network."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


@pytest.mark.slow
def test_every_part_has_its_rows():
    done = subprocess.run([sys.executable, str(SCRIPT), "--small"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert {"attention dot_product", "step, diffusers", "demo, start to mp4"} <= set(rows)
    (mine,) = (line for name, line in rows.items() if name.startswith("step, ") and "diffusers" not in name)
    assert float(mine.split()[-1]) > 0  # its ratio to diffusers
