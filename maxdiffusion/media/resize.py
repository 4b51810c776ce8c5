"""Resizing of float images as torch does it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

A = -0.75  # of the cubic kernel (Keys, 1981), torch's choice; PIL and `jax.image` have -0.5


def bicubic(image: Float[np.ndarray, "h1 w1 c"], height: int, width: int) -> Float[np.ndarray, "h w c"]:
    """Bicubic with half-pixel centres and without antialiasing; it may overshoot the range of `image`; fp32.

    Reference: `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`, to 2e-6 of the largest value.
    """
    return _rows(_rows(image, height).swapaxes(0, 1), width).swapaxes(0, 1)


def _rows(image: Float[np.ndarray, "n m c"], size: int) -> Float[np.ndarray, "size m c"]:
    """Resamples the first axis by four taps for each row; rows beyond the edge repeat it."""
    # Rounded to fp32 once, as by torch's fused multiply-add: exact positions differ from its results by 2e-4.
    at = (np.float64(np.float32(len(image) / size)) * (np.arange(size) + 0.5) - 0.5).astype(np.float32)
    row = np.floor(at)
    t = at - row
    first = row.astype(int) - 1
    result = np.zeros((size, *image.shape[1:]), np.float32)
    for tap, weight in enumerate((_far(t + 1), _near(t), _near(1 - t), _far(2 - t))):
        result += weight[:, None, None] * image[np.clip(first + tap, 0, len(image) - 1)]
    return result


def _near(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The kernel at distances up to 1."""
    return ((A + 2) * x - (A + 3)) * x * x + 1


def _far(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The kernel at distances from 1 to 2."""
    return ((A * x - 5 * A) * x + 8 * A) * x - 4 * A
