"""Resizing against torch and OpenCV."""

import cv2
import numpy as np
import pytest
import torch

from maxdiffusion.media.resize import bicubic, bilinear


@pytest.mark.parametrize(
    ("own", "size"),
    [
        ((37, 53), (224, 224)),  # up, both axes
        ((640, 427), (224, 224)),  # down, proportions lost
        ((1000, 1500), (768, 1168)),
        ((2400, 90), (240, 96)),  # down by ten, and up a little
        ((5, 1), (16, 16)),  # fewer pixels than taps
        ((64, 48), (64, 48)),
    ],
)
def test_bicubic_equals_torch(own, size):
    image = np.random.default_rng(0).uniform(-1, 1, (*own, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None], size, mode="bicubic")[0]
    ours = bicubic(image, *size)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.permute(1, 2, 0).numpy(), atol=4e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((70, 50), (32, 23)),
        ((50, 70), (64, 96)),
        ((64, 64), (32, 32)),
        ((33, 47), (128, 200)),
        ((8, 9), (64, 64)),
        ((1, 1), (5, 7)),
        ((300, 200), (96, 64)),
        ((40, 60), (40, 60)),
        ((1080, 1920), (360, 639)),
    ],
)
def test_every_level_is_that_of_opencv(old, new):
    image = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    theirs = cv2.resize(image, new[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(bilinear(image, *new), theirs)
