"""Letterboxing and the mirrored end of a driving video as diffusers' modular pipeline has them."""

import numpy as np
import pytest
from diffusers.modular_pipelines.wan_animate_2.video_processor import WanAnimate2VideoProcessor
from PIL import Image

from maxdiffusion.conditioning.animate2 import frames_of
from maxdiffusion.errors import UserError
from maxdiffusion.media.frames import letterboxed, to_float


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
@pytest.mark.parametrize(("own", "filter"), [((75, 119), "bilinear"), ((121, 60), "bicubic")])
def test_letterboxing_is_the_references(size, own, filter):
    image = np.random.default_rng(0).integers(0, 256, (*own, 3), dtype=np.uint8)
    processor = WanAnimate2VideoProcessor(resample=filter)
    theirs = processor.preprocess(Image.fromarray(image), *size, resize_mode="fill")[0].permute(1, 2, 0).numpy()
    mine = letterboxed(image, *size, Image.Resampling[filter.upper()])
    np.testing.assert_allclose(to_float(mine[None], *size)[0], theirs, atol=1e-6)


def test_a_picture_of_which_nothing_is_left_is_refused():
    with pytest.raises(UserError, match="2000 x 1 pixels within 96 x 64"):
        letterboxed(np.zeros((1, 2000, 3), np.uint8), 64, 96)


def test_a_driving_video_goes_on_backwards_from_its_last_frame():
    assert frames_of(5, 0, 8) == [0, 1, 2, 3, 4, 4, 3, 2]  # the reference's own example
    assert frames_of(2, 1, 6) == [1, 1, 0, 0, 1, 1]  # where the reference has no more frames
