"""A prompt file, run, killed and run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from maxdiffusion import generate_wan, request
from maxdiffusion.media.read import read_video
from maxdiffusion.weights.latents_io import load_latents
from tests.support.gallery import Parsed

ROOT = Path(__file__).parents[2]
PAGE = str(ROOT / "configs" / "wan_tiny.yml")
SQUARE = "a white square moving down on a black background"
LINES = [
    {"seed": 1, "output": "first"},
    {"prompt": SQUARE, "size": "32*16", "output": "small"},
    {"seed": 2, "output": "second"},
    {"prompt": SQUARE, "seed": 5, "size": "32*16", "output": "small too"},
]


@pytest.mark.slow
def test_lines_are_the_videos_that_the_command_line_would_make(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    words = [PAGE, "num_inference_steps=2", "num_frames=5", "size=48*32", "progress=off", "jax_cache_dir="]
    words += [f"output_dir={tmp_path}/out", "run_name=r", "per_device_batch_size=2"]
    paths = generate_wan.run(request.load([*words, f"prompts={tmp_path}/p.jsonl"]))
    assert [path.name for path in paths] == ["first.mp4", "second.mp4", "small.mp4", "small too.mp4"]
    assert read_video(paths[0]).shape == (5, 32, 48, 3) and read_video(paths[3]).shape == (5, 16, 32, 3)
    lone = [*words, f"prompt={SQUARE}", "seed=5", "size=32*16", f"save_file={tmp_path}/lone.mp4"]
    lone = [word for word in lone if word != "size=48*32"]
    generate_wan.run(request.load(lone))
    got, want = (
        load_latents(p)[0]
        for p in (tmp_path / "out/r/small too.latents.safetensors", tmp_path / "lone.latents.safetensors")
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    page = tmp_path / "out" / "r" / "index.html"
    page.unlink()  # as if killed before it was written
    assert generate_wan.run(request.load([*words, f"prompts={tmp_path}/p.jsonl"])) == []
    assert [card["name"] for card in Parsed(page).cards] == ["first.mp4", "second.mp4", "small.mp4", "small too.mp4"]


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    lines = [{"seed": seed, "output": f"v{seed}"} for seed in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [sys.executable, str(ROOT / "generate_wan.py"), PAGE, f"prompts={tmp_path}/p.jsonl", "num_frames=5"]
    words += [
        "size=48*32",
        f"output_dir={tmp_path}/out",
        "run_name=r",
        f"jax_cache_dir={tmp_path}/cache",
        "progress=off",
    ]
    for wanted in (1, 3):
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        while len(list(tmp_path.glob("out/r/v*.json"))) < wanted:
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/r/v*.json")}
    assert 3 <= len(before) < 6
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "of 6 videos of" in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.glob("out/r/*.mp4")) == [f"v{seed}.mp4" for seed in range(6)]
    finished = json.loads((tmp_path / "out/r/p.manifest.json").read_text())
    assert all("bytes" in row for row in finished.values()) and len(finished) == 6
    kept = [path for path, changed in before.items() if path.stat().st_mtime_ns == changed]
    assert len(Parsed(tmp_path / "out" / "r" / "index.html").cards) == 6
    assert len(kept) >= len(before) - 1  # the last may have had its record and not yet its row
