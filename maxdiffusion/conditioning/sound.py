"""The hidden states of a sound at the frames of a video.

Reference: wan/modules/s2v/audio_encoder.py of the official repository.
"""

from __future__ import annotations

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

RATE = 30  # hidden states per second after a first resampling, of which each frame then takes the nearest


def _resampled(states: int, rate: float) -> int:
    """How many hidden states are left at RATE; in the floating-point order of the reference."""
    return int(states / rate * RATE)


def clips(states: int, rate: float, fps: Fraction, length: int) -> int:
    """The number of clips of `length` frames that last as long as the sound: one more than those that it fills."""
    return int(_resampled(states, rate) / (length * RATE / float(fps))) + 1


def at_frames(
    hidden: Float[Array, "layers states c"], rate: float, fps: Fraction, frames: int
) -> Float[Array, "layers frames c"]:
    """The hidden states of each frame of a video of `frames` frames; zeros after the end of the sound.

    Args:
      hidden: of the whole sound.
      rate: of them, per second.
      fps: of the video.
      frames: its length.
    """
    states = hidden.shape[1]
    count = _resampled(states, rate)
    nearest = np.round(np.arange(frames) / float(fps) * RATE).astype(np.int64)
    # Linear interpolation between the first and the last state, which keep their places (torch's `align_corners`).
    at = np.minimum(nearest, max(count - 1, 0)) * ((states - 1) / max(count - 1, 1))
    left = np.minimum(at.astype(np.int64), states - 1)
    right, weight = np.minimum(left + 1, states - 1), (at - left)[:, None].astype(np.float32)
    found = hidden[:, left] * (1 - weight) + hidden[:, right] * weight
    return jnp.where((nearest < count)[:, None], found, 0)
