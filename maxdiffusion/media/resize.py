"""Resizing of images as torch and OpenCV do it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Real, UInt8

A = -0.75  # of the cubic kernel (Keys, 1981), torch's choice; PIL and `jax.image` have -0.5
BITS = 11  # OpenCV's bilinear weights are multiples of 2 ** -11


def bicubic(image: Real[np.ndarray, "h1 w1 c"], height: int, width: int) -> Float[np.ndarray, "h w c"]:
    """Bicubic with half-pixel centres and without antialiasing; it may overshoot the range of `image`; fp32.

    Reference: `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`, to 2e-6 of the largest value.
    """
    return _rows(_rows(image, height).swapaxes(0, 1), width).swapaxes(0, 1)


def _rows(image: Real[np.ndarray, "n m c"], size: int) -> Float[np.ndarray, "size m c"]:
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


def bilinear(image: UInt8[np.ndarray, "h1 w1 c"], height: int, width: int) -> UInt8[np.ndarray, "h w c"]:
    """Resize bilinearly with half-pixel centres and without antialiasing, in fixed point as `cv2.resize`.

    Every level is OpenCV's (measured with 4.11.0 and 5.0.0): its weights, its shifts and its order of rounding.
    """
    left, right, columns = _taps(image.shape[1], width)
    above, below, rows = _taps(image.shape[0], height)
    beside = (left < 0) | (right >= image.shape[1])  # the nearest column alone; rows outside are repeated instead
    columns[:, beside] = np.array([[2**BITS], [0]])
    (left, right), (above, below) = (
        np.clip(at, 0, size - 1) for at, size in (((left, right), image.shape[1]), ((above, below), image.shape[0]))
    )
    pixels = image.astype(np.int32)
    wide = (pixels[:, left] * columns[0][:, None] + pixels[:, right] * columns[1][:, None]) >> 4
    sums = (wide[above] * rows[0][:, None, None] >> 16) + (wide[below] * rows[1][:, None, None] >> 16)
    return ((sums + 2) >> 2).astype(np.uint8)


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two neighbours of each new pixel and their weights, (2, new) in units of 2 ** -BITS."""
    at = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    first = np.floor(at).astype(int)
    fraction = at - first.astype(np.float32)
    weights = np.rint(np.stack([1 - fraction, fraction]) * np.float32(2**BITS)).astype(np.int32)
    return first, first + 1, weights
