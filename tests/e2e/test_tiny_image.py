"""The bundled image-to-video miniature: what the command makes of its image and of two prompts."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from maxdiffusion.weights.latents_io import save_latents
from tests.support.tiny_wan import data
from tests.support.videos import ROOT, made, psnr

MODEL = ROOT / "models" / "wan_tiny_i2v"

DIRECTIONS = ("left", "down")
STEPS = 6


@pytest.fixture(scope="module")
def noise():
    """The same for both prompts."""
    return np.repeat(np.random.default_rng(0).standard_normal((1, 5, 12, 12, 8), np.float32), 2, 0)


@pytest.fixture(scope="module")
def videos(tmp_path_factory, noise):
    """Of the page's own image, moving left and moving down."""
    folder = tmp_path_factory.mktemp("tiny_image")
    save_latents(folder / "noise.safetensors", noise, {})
    words = [
        f"prompt=[{', '.join(f'moving {direction}' for direction in DIRECTIONS)}]",
        f"num_inference_steps={STEPS}",
        f"initial_latents={folder}/noise.safetensors",
    ]
    return made(folder, *words, page="wan_tiny_i2v")


@pytest.mark.slow
def test_the_first_frame_is_the_image(videos):
    image = np.asarray(Image.open(MODEL / "example.png"))
    for video in videos:
        assert video.shape == (17, 96, 96, 3)
        print(f"first frame: {psnr(video[0], image):.1f} dB")
        assert psnr(video[0], image) > 22


@pytest.mark.slow
def test_the_prompt_moves_what_the_image_shows(videos):
    """An orange triangle on teal: no prompt says so, and the text-to-video sibling knows neither colour."""
    still = data.Clip("triangle", (235, 120, 40), (20, 80, 90), 14.0, ((48, 50),))
    np.testing.assert_array_equal(data.render_uint8(still)[0], np.asarray(Image.open(MODEL / "example.png")))
    for direction, video in zip(DIRECTIONS, videos, strict=True):
        measured, kept = data.measure(video), data.compare(video, still)
        print(measured, kept)
        assert (measured.direction, measured.visible) == (direction, 1)
        assert measured.displacement > 12
        assert kept.colour_error < 20 and kept.background_error < 12


def test_the_reference_makes_the_same_of_the_checkpoint(videos, noise):
    pipeline = diffusers.WanImageToVideoPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        image=Image.open(MODEL / "example.png"),
        prompt=f"moving {DIRECTIONS[0]}",
        negative_prompt="",
        height=96,
        width=96,
        num_frames=17,
        num_inference_steps=STEPS,
        guidance_scale=2.0,
        latents=torch.from_numpy(noise[:1].transpose(0, 4, 1, 2, 3).copy()),
        output_type="np",
    ).frames[0]
    figure = psnr(videos[0], np.round(theirs * 255).astype(np.uint8))
    print(f"wan_tiny_i2v: {figure:.1f} dB")
    assert figure > 60
