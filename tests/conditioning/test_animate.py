"""The conditioning of Animate against diffusers' WanAnimatePipeline on a random VAE, and against the official code."""

import cv2
import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from maxdiffusion.conditioning.animate import box, given_channels, on_black
from maxdiffusion.media.frames import to_float
from tests.support.animate import TINY
from tests.support.vae import Pair

HEIGHT, WIDTH, FRAMES = 32, 48, 9


@pytest.fixture(scope="module")
def vae():
    return Pair()


@pytest.fixture(scope="module")
def pipeline(vae):
    transformer = diffusers.WanAnimateTransformer3DModel(**TINY)
    return diffusers.WanAnimatePipeline(None, None, vae.torch, None, None, None, transformer)


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize(("mode", "known"), [("animate", 0), ("replace", 5)])
def test_the_given_channels_match_the_reference(vae, pipeline, mode, known):
    image = pixels(0, 70, 50)
    background = to_float(pixels(1, FRAMES, HEIGHT, WIDTH), HEIGHT, WIDTH)
    mask = np.random.default_rng(2).uniform(0, 1, (FRAMES, HEIGHT, WIDTH)).astype(np.float32)
    before = to_float(pixels(3, known, HEIGHT, WIDTH), HEIGHT, WIDTH) if known else None
    as_torch = lambda x: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 0)))[None]  # noqa: E731
    with torch.no_grad():
        shown = pipeline.vae_image_processor.preprocess(
            Image.fromarray(image), height=HEIGHT, width=WIDTH, resize_mode="fill"
        )
        reference = pipeline.prepare_reference_image_latents(shown, device="cpu")
        segment = pipeline.prepare_prev_segment_cond_latents(
            None if before is None else as_torch(before),
            as_torch(background),
            as_torch(mask[..., None]),
            segment_frame_length=FRAMES,
            start_frame=8 if known else 0,
            height=HEIGHT,
            width=WIDTH,
            prev_segment_cond_frames=known or 1,
            task=mode,
            device="cpu",
        )
        theirs = torch.cat([reference, segment], dim=2)[0].permute(1, 2, 3, 0).numpy()
    (ours,) = to_float(on_black(image, HEIGHT, WIDTH, "lanczos")[None], HEIGHT, WIDTH)
    np.testing.assert_array_equal(ours, shown[0].permute(1, 2, 0).numpy())
    given = background.copy() if mode == "replace" else np.zeros_like(background)
    if before is not None:
        given[:known] = before
    character = vae.ours.encode(jnp.asarray(ours)[None, None])[0]
    unknown = mask if mode == "replace" else np.ones_like(mask)
    np.testing.assert_allclose(given_channels(vae.ours, character, given, unknown, known), theirs, atol=1e-4)


@pytest.mark.parametrize("own", [(70, 50), (50, 71), (32, 48), (300, 200), (31, 47), (9, 200)])
def test_a_character_is_fitted_as_in_the_official_code(own):
    """`WanAnimate.padding_resize` written out; the odd sizes tell its centring from that of diffusers."""
    image = pixels(4, *own)
    theirs = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    if own[0] / own[1] > HEIGHT / WIDTH:
        w = int(HEIGHT / own[0] * own[1])
        left = int((WIDTH - w) / 2)
        theirs[:, left : left + w] = cv2.resize(image, (w, HEIGHT))
    else:
        h = int(WIDTH / own[1] * own[0])
        top = int((HEIGHT - h) / 2)
        theirs[top : top + h] = cv2.resize(image, (WIDTH, h))
    np.testing.assert_array_equal(on_black(image, HEIGHT, WIDTH, "bilinear"), theirs)


def test_both_ways_to_fit_a_character_differ():
    assert box((70, 50), HEIGHT, WIDTH, "bilinear") == (0, 13, 32, 22)
    assert box((70, 51), HEIGHT, WIDTH, "bilinear")[1] == 12 and box((70, 51), HEIGHT, WIDTH, "lanczos")[1] == 13
