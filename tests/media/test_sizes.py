"""Sizes in an image's proportions against the official code, over a grid of images and areas."""

import pytest
from PIL import Image

from maxdiffusion.errors import UserError
from maxdiffusion.media.sizes import Proportions, covered, floored, floored_twice, nearest, own, rounded, within
from tests.support import official
from tests.support.start_image import encoded

IMAGES = [(w, h) for w in (33, 64, 97, 150) for h in (24, 64, 100, 131)] + [(15, 10), (832, 480), (480, 832)]
AREAS = [832 * 480, 1280 * 720, 1280 * 704, 512 * 512]


def official_size(image, area):
    height, width, _ = encoded("i2v", Image.new("RGB", image), area).shape
    return width, height


def test_from_images_as_the_official_code():
    assert floored(1280 * 720, (1500, 1000), 16) == official_size((1500, 1000), 1280 * 720) == (1168, 768)
    assert floored(832 * 480, (832, 480), 16) == official_size((832, 480), 832 * 480) == (832, 464)  # 479.99... down
    for area in (320 * 192, 240 * 176):
        for image in IMAGES:
            assert floored(area, image, 16) == official_size(image, area), (image, area)


def test_from_text_and_images_as_the_official_code():
    theirs = official.load("utils.utils").best_output_size
    assert nearest(1280 * 704, (1024, 1024), 32) == (960, 928)
    assert nearest(1280 * 704, (1216, 832), 32) == (1152, 768)
    for area in AREAS:
        for width, height in IMAGES:
            assert nearest(area, (width, height), 32) == theirs(width, height, 32, 32, area), (width, height, area)


def test_from_speech_as_the_official_code():
    module = official.load("speech2video")
    for area in AREAS:
        for width, height in IMAGES:
            theirs = module.WanS2V.get_size_less_than_area(None, height, width, area, 64)
            assert covered(area, (width, height), 64) == theirs[::-1], (width, height, area)


def test_diffusers_rounds_first():
    assert rounded(1280 * 720, (1500, 1000), 16) == (1168, 784)
    assert rounded(1280 * 704, (1024, 1024), 32) == (928, 928)


@pytest.mark.parametrize(
    ("area", "video", "size"),
    [
        (832 * 480, (1920, 1080), (832, 480)),
        (832 * 480, (640, 480), (640, 480)),  # not more than it has
        (1280 * 720, (1000, 1500), (784, 1168)),
        (1280 * 720, (1280, 720), (1280, 720)),
    ],
)
def test_a_control_video_is_not_enlarged(area, video, size):
    """Sizes of `VaceVideoProcessor`, computed by hand."""
    assert within(area, video, 16) == size


def test_a_pose_keeps_its_size():
    assert own(1280 * 720, (833, 491), 16) == (832, 480)


@pytest.mark.parametrize("rule", [floored, floored_twice, nearest, rounded, within, own])
@pytest.mark.parametrize("image", [(1, 4000), (4000, 1)])
def test_too_narrow_an_image(rule, image):
    with pytest.raises(UserError, match=rf"{image[0]} x {image[1]} pixels is too narrow"):
        Proportions(rule, 16, None).size(832 * 480, image)
