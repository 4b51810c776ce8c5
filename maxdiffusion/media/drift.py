"""How the look of a video changes from clip to clip: colour, contrast and sharpness."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

log = logging.getLogger(__name__)

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709


class Look(NamedTuple):
    """Means over the frames of a clip.

    Attributes:
      red, green, blue: mean of the channel, 0..255.
      contrast: standard deviation of luma, 0..255.
      sharpness: variance of luma's Laplacian.
    """

    red: float
    green: float
    blue: float
    contrast: float
    sharpness: float


def look(frames: UInt8[np.ndarray, "f h w 3"]) -> Look:
    """Measures a clip."""
    return mean([look_of_frame(frame) for frame in frames])


def look_of_frame(frame: UInt8[np.ndarray, "h w 3"]) -> Look:
    """Measures a frame."""
    luma = frame.astype(np.float32) @ _LUMA
    return Look(*map(float, (*frame.mean(axis=(0, 1)), luma.std(), _laplacian(luma).var())))


def mean(looks: Sequence[Look]) -> Look:
    """The look of a clip, of those of its frames."""
    return Look(*np.mean(looks, axis=0).tolist())


def _laplacian(luma: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h2 w2"]:
    """By the four neighbours, of all pixels but those of the border."""
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return around - 4 * luma[1:-1, 1:-1]


def report(looks: Sequence[Look]) -> None:
    """Logs the figures of the first clip, then how those of the others differ from them."""
    first, *others = looks
    log.info("drift: clip 1 has red %.1f, green %.1f, blue %.1f, contrast %.1f (of 255), sharpness %.1f", *first)
    for number, other in enumerate(others, 2):
        changes = [a - b for a, b in zip(other[:4], first[:4], strict=True)]
        share = other.sharpness / first.sharpness if first.sharpness else float("nan")
        log.info(
            "drift: clip %d: red %+.1f, green %+.1f, blue %+.1f, contrast %+.1f, sharpness x %.2f",
            *(number, *changes, share),
        )
