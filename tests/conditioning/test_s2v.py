"""Images and clips as wan/speech2video.py of the official repository has them."""

import numpy as np
import pytest
from PIL import Image

from maxdiffusion.conditioning import s2v
from tests.support.parity import relative_error
from tests.support.vae import Pair


def picture(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("given", [(200, 120), (120, 200), (128, 64), (64, 129)])
def test_an_image_is_cropped_in_the_middle(given):
    image = picture(*given)
    w, h = (int(64 * side / min(given)) for side in given)  # of torchvision's `Resize(64)`
    left, top = round((w - 64) / 2), round((h - 64) / 2)
    want = image.resize((w, h), Image.Resampling.BILINEAR).crop((left, top, left + 64, top + 64))
    np.testing.assert_array_equal(np.asarray(s2v.fitted(image, 64, 64)), np.asarray(want))


def test_an_image_that_is_too_short_for_the_size_is_put_on_black():
    found = np.asarray(s2v.fitted(picture(100, 64), 128, 64))
    assert not found[:, :14].any() and not found[:, 114:].any()
    np.testing.assert_array_equal(found[:, 14:114], np.asarray(picture(100, 64)))


@pytest.mark.parametrize("before", [1, 4])  # an image, or frames
def test_a_clip_is_decoded_after_what_was_before_it(before):
    pair, rng = Pair(), np.random.default_rng(1)
    first, latents = (rng.standard_normal((n, 2, 2, 4), dtype=np.float32) for n in (before, 3))
    found = np.concatenate(list(s2v.frames_of(pair.ours, first[None], latents[None])), axis=1)
    assert relative_error(found, pair.decode(np.concatenate([first, latents])[None])[:, -12:]) < 1e-4
