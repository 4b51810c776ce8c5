import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from maxdiffusion.errors import UserError
from maxdiffusion.media.frames import in_bytes, to_uint8


def edges():
    """Random values, values beyond the range, and both neighbours in float32 of every value that rounds at a half."""
    halves = ((np.arange(255) + 0.5) / 255 * 2 - 1).astype(np.float32)
    near = np.concatenate([halves, np.nextafter(halves, np.float32(-2)), np.nextafter(halves, np.float32(2))])
    rest = np.random.default_rng(0).normal(size=2 * 5 * 16 * 16 * 3 - near.size - 4).astype(np.float32)
    special = np.array([np.inf, -np.inf, 1, -1], np.float32)
    return np.concatenate([near, special, rest]).reshape(2, 5, 16, 16, 3)


def test_every_pixel_is_the_reference_s():
    video = edges()
    torch_video = torch.from_numpy(video).permute(0, 4, 1, 2, 3)  # b c f h w
    images = VideoProcessor(vae_scale_factor=8).postprocess_video(torch_video, output_type="pil")
    expected = np.stack([[np.asarray(image) for image in clip] for clip in images])
    np.testing.assert_array_equal(to_uint8(jnp.asarray(video)), expected)
    assert len(np.unique(expected)) == 256


def test_chunks_give_the_same_frames():
    video, told = jnp.asarray(edges()), []
    got = list(in_bytes(iter([video[:, :1], video[:, 1:]]), told.append))
    assert told == [1, 4]
    np.testing.assert_array_equal(np.concatenate(got, axis=1), to_uint8(video))


def test_frames_that_are_there_come_first():
    video, told = jnp.asarray(edges()), []
    got = list(in_bytes(iter([video[:, 2:3], video[:, 3:]]), told.append, "", to_uint8(video[:, :2])))
    assert told == [2, 1, 2] == [chunk.shape[1] for chunk in got]
    np.testing.assert_array_equal(np.concatenate(got, axis=1), to_uint8(video))


def test_bfloat16_is_widened_first():
    video = jnp.linspace(-1, 1, 192, dtype=jnp.bfloat16).reshape(1, 1, 8, 8, 3)
    np.testing.assert_array_equal(to_uint8(video), to_uint8(video.astype(jnp.float32)))


def test_undefined_values_are_not_drawn():
    video = np.zeros((1, 1, 8, 8, 3), np.float32)
    video[0, 0, 3, 3] = np.nan
    with pytest.raises(UserError, match=r"has 3 NaN values, .*; try vae_dtype=float32"):
        to_uint8(video)
