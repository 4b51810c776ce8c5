"""The hidden states of a sound at the frames of a video.

Reference: wan/modules/s2v/audio_encoder.py of the official repository.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from maxdiffusion import parallel
from maxdiffusion.errors import UserError
from maxdiffusion.media.samples import Samples
from maxdiffusion.models.wav2vec2.config import Wav2Vec2Config
from maxdiffusion.models.wav2vec2.encoder import Wav2Vec2, normalised
from maxdiffusion.runtime.distributed import fetch

RATE = 30  # hidden states per second after a first resampling, of which each frame then takes the nearest


def check_length(location: str, samples: Samples, config: Wav2Vec2Config) -> None:
    """Checks that a sound gives the encoder two hidden states at least, between which frames are interpolated.

    Raises:
      UserError: it is shorter.
    """
    if config.length(len(samples.values)) < 2:
        raise UserError(f"{location} has {samples.seconds:.3g} s of sound, of which nothing can be made; give 0.1 s.")


def encode(
    encoder: Wav2Vec2, samples: Float[np.ndarray, " samples"], fps: Fraction, frames: int
) -> Float[np.ndarray, "layers frames c"]:
    """`at_frames` of the encoder's hidden states of the whole sound."""
    return fetch(program()(*nnx.split(encoder), parallel.put(normalised(samples)[None]), fps, frames))


def program() -> Any:
    """The jitted program: (graph and parameters of the encoder, normalised samples, fps, frames) -> hidden states."""
    return parallel.jit(_run, static_argnums=(0, 3, 4))


def _run(graph: Any, params: Any, samples: jax.Array, fps: Fraction, frames: int) -> jax.Array:
    encoder = nnx.merge(graph, params)
    return encoder(samples, lambda hidden: at_frames(hidden, encoder.config.rate, fps, frames))[0]


def _resampled(states: int, rate: float) -> int:
    """How many hidden states are left at RATE; in the floating-point order of the reference."""
    return int(states / rate * RATE)


def clips(states: int, rate: float, fps: Fraction, length: int) -> int:
    """The number of clips of `length` frames that last as long as the sound: one more than those that it fills."""
    return int(_resampled(states, rate) / (length * RATE / float(fps))) + 1


def at_frames(
    hidden: Float[Array, "_ states c"], rate: float, fps: Fraction, frames: int
) -> Float[Array, "_ frames c"]:
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
