"""The conditioning of Animate against diffusers' WanAnimatePipeline, on a random VAE."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from maxdiffusion.conditioning.animate import given_channels, on_black
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
    (ours,) = to_float(on_black(image, HEIGHT, WIDTH)[None], HEIGHT, WIDTH)
    np.testing.assert_array_equal(ours, shown[0].permute(1, 2, 0).numpy())
    given = background.copy() if mode == "replace" else np.zeros_like(background)
    if before is not None:
        given[:known] = before
    character = vae.ours.encode(jnp.asarray(ours)[None, None])[0]
    unknown = mask if mode == "replace" else np.ones_like(mask)
    np.testing.assert_allclose(given_channels(vae.ours, character, given, unknown, known), theirs, atol=1e-4)
