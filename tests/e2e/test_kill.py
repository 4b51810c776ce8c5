"""Killed at any moment, a run leaves whole files or none under their final names."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from maxdiffusion.media.read import read_video
from maxdiffusion.weights.latents_io import load_latents

ROOT = Path(__file__).parents[2]


def command(bundled, out, cache):
    return [
        sys.executable,
        str(ROOT / "generate_wan.py"),
        str(ROOT / "configs" / "wan_tiny.yml"),
        f"pretrained_model_name_or_path={bundled}",
        f"output_dir={out}",
        f"jax_cache_dir={cache}",
        "num_inference_steps=2",
        "progress=off",
    ]


def check(out: Path) -> set[str]:
    """Every visible file is whole; returns their suffixes."""
    suffixes = set()
    for path in out.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(out).parts) or path.is_dir():
            continue
        if path.suffix == ".mp4":
            assert read_video(path).shape == (17, 96, 96, 3)
        elif path.suffix == ".json":
            assert json.loads(path.read_text())["output"].endswith(".mp4")
        elif path.suffix == ".jpg":
            with Image.open(path) as sheet:
                assert sheet.size == (6 * 96, 96)
        else:
            assert load_latents(path)[0].shape == (1, 5, 12, 12, 8)
        suffixes.add(path.suffix)
    return suffixes


@pytest.mark.slow
def test_sigkill_leaves_no_broken_result(bundled, tmp_path):
    words = command(bundled, tmp_path / "out", tmp_path / "cache")
    begun = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)  # fills the compile cache, so that all phases are near
    subprocess.run(words, check=True, capture_output=True)
    whole = (time.perf_counter() - begun) / 2
    assert check(tmp_path / "out") == {".mp4", ".json", ".safetensors", ".jpg"}
    rng, killed = random.Random(0), 0
    for _ in range(20):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.2, 1.1) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        check(tmp_path / "out")
    assert killed >= 5
    subprocess.run(words, check=True, capture_output=True)  # what the killed runs left hinders nobody
    check(tmp_path / "out")
