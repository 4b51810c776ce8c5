"""Sizes in an image's proportions against the official code, over a grid of images and areas."""

import types

import pytest
import torch
from PIL import Image

from maxdiffusion.errors import UserError
from maxdiffusion.media.sizes import Proportions, floored, nearest, rounded
from tests.support import official

IMAGES = [(w, h) for w in (33, 64, 97, 150) for h in (24, 64, 100, 131)] + [(15, 10), (832, 480), (480, 832)]
AREAS = [832 * 480, 1280 * 720, 1280 * 704, 512 * 512]


class Seen(Exception):
    """Ends an official run where it encodes the start image."""


def official_size(image, area):
    """Width and height of the frame that `WanI2V.generate` encodes."""

    def encode(videos):
        raise Seen(tuple(reversed(videos[0].shape[-2:])))

    pipe = object.__new__(official.load("image2video").WanI2V)
    pipe.__dict__.update(vae_stride=(4, 8, 8), patch_size=(1, 2, 2), sp_size=1, device="cpu", t5_cpu=True)
    pipe.__dict__.update(text_encoder=lambda texts, device: [torch.zeros(1)], sample_neg_prompt="")
    pipe.vae = types.SimpleNamespace(encode=encode)
    with pytest.raises(Seen) as seen:
        pipe.generate("", Image.new("RGB", image), max_area=area, frame_num=1, seed=0)
    return seen.value.args[0]


def test_from_images_as_the_official_code():
    assert floored(1280 * 720, (1500, 1000), 16) == official_size((1500, 1000), 1280 * 720) == (1168, 768)
    for area in (832 * 480, 320 * 192):
        for image in IMAGES:
            assert floored(area, image, 16) == official_size(image, area), (image, area)


def test_from_text_and_images_as_the_official_code():
    theirs = official.load("utils.utils").best_output_size
    assert nearest(1280 * 704, (1024, 1024), 32) == (960, 928)
    assert nearest(1280 * 704, (1216, 832), 32) == (1152, 768)
    for area in AREAS:
        for width, height in IMAGES:
            assert nearest(area, (width, height), 32) == theirs(width, height, 32, 32, area), (width, height, area)


def test_diffusers_rounds_first():
    assert rounded(1280 * 720, (1500, 1000), 16) == (1168, 784)
    assert rounded(1280 * 704, (1024, 1024), 32) == (928, 928)


@pytest.mark.parametrize("rule", [floored, nearest, rounded])
@pytest.mark.parametrize("image", [(1, 4000), (4000, 1)])
def test_too_narrow_an_image(rule, image):
    with pytest.raises(UserError, match=rf"{image[0]} x {image[1]} pixels is too narrow"):
        Proportions(rule, 16, None).size(832 * 480, image)
