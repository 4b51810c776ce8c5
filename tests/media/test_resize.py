"""Resizing against torch."""

import numpy as np
import pytest
import torch

from maxdiffusion.media.resize import bicubic


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
