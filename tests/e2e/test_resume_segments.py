"""A run of S2V or Animate 2 that is killed within its second segment goes on there."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import cli
from maxdiffusion.media.write import write
from maxdiffusion.weights.latents_io import load_latents
from tests.support import animate2, official, official_s2v, sounds
from tests.support.parity import relative_error

ROOT = Path(__file__).parents[2]
STEPS = 12


def s2v(checkpoint: Path, folder: Path) -> list[str]:
    """Two clips, of which the second is made after the decoded frames of the first."""
    sounds.tone(folder / "sound.wav", seconds=1.6)
    return [*official_s2v.words(checkpoint, folder), f"audio={folder / 'sound.wav'}", "num_frames=21"]


def driven(checkpoint: Path, folder: Path) -> list[str]:
    """Two segments that share a frame, of an image that is put on black."""
    frames = np.random.default_rng(1).integers(0, 256, (14, 64, 96, 3), np.uint8)
    write(frames, folder / "driving.npy", 24, "npy", {})
    return [*animate2.words(checkpoint, folder), f"driving_video={folder / 'driving.npy'}"]


@pytest.mark.slow
@pytest.mark.parametrize(("net", "words_of"), [("speaker", s2v), ("dancer", driven)], ids=["S2V", "Animate 2"])
def test_a_run_killed_in_its_second_segment_goes_on_there(request, tmp_path, capfd, net, words_of):
    picture = np.random.default_rng(0).integers(0, 256, (57, 80, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "image.png")
    words = [*words_of(request.getfixturevalue(net), tmp_path), *official.ONE, f"image={tmp_path / 'image.png'}"]
    words += ["size=96*64", f"num_inference_steps={STEPS}", "guidance_scale=2", "run_name=r", "seed=3"]
    words += [f"jax_cache_dir={tmp_path / 'cache'}", "log_level=info"]
    assert cli.command([*words, f"output_dir={tmp_path / 'whole'}"]) == 0

    out = [f"output_dir={tmp_path / 'out'}", "checkpoint_steps=1"]
    life = subprocess.Popen([sys.executable, ROOT / "generate_wan.py", *words, *out], stderr=subprocess.DEVNULL)
    try:
        while life.poll() is None and not [*(tmp_path / "out" / "r").glob(".*.state/1000[3-9]")]:
            time.sleep(0.02)
    finally:
        life.kill()
        life.wait()
    assert not [*(tmp_path / "out" / "r").glob("*.latents.safetensors")]
    capfd.readouterr()
    assert cli.command([*words, *out]) == 0
    said = capfd.readouterr().err
    assert f"of {STEPS} of segment 2 of 2" in said, said
    [ours], [want] = ([*(tmp_path / made / "r").glob("*.latents.safetensors")] for made in ("out", "whole"))
    error = relative_error(load_latents(ours)[0], load_latents(want)[0])
    print(f"{net}, killed: latents within {error:.1e}")
    assert error < 1e-5
