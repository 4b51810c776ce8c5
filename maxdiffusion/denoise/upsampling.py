"""The change from half to whole height and width within a run, in the frequencies of a cosine transform.

Latents at noise level s become those of twice the height and width at level 2 s / (1 + s): their frequencies (an
orthonormal DCT-II of each frame) are the lowest ones of the larger frame, whose others are noise of level s, and
all are scaled by 2 / (1 + s). The transform to twice the size halves the values of the signal and keeps the level of
the noise, which is why the level rises. Reference, also of `level`: `dct_rewind` of SGLang (sgl-project/sglang#27524).
There each of the two noises is drawn by itself; here they are the two parts of one, that of the whole size, so that a
seed makes nearly the video that it makes without: one step of 24 at half size keeps 44 dB on the miniature, with noises
of their own 16 dB.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def level(height: int, width: int, loss: float = 0.05) -> float:
    """The noise level down to which latents of half of this height and width do; a larger `loss` makes it lower.

    The power of the noise there is that of the frequencies which the smaller latents lack, by a power law fitted to
    WAN's latents. `height` and `width` are those of the whole latents.
    """
    power = 219.484718 * (min(height, width) // 4) ** -2.422687
    return 1 / (1 + math.sqrt(loss / (power * (1 + power - loss))))


def raised(sigma: float) -> float:
    """The noise level after `upsample`."""
    return 2 * sigma / (1 + sigma)


def halve(x: Float[Array, "b f h w c"]) -> Float[Array, "b f h2 w2 c"]:
    """The lowest frequencies as latents of half the height and width; of white noise, white noise. float32."""
    _, _, h, w, _ = x.shape
    return _along(_larger(h // 2).T, _larger(w // 2).T, x)


def upsample(
    x: Float[Array, "b f h w c"], noise: Float[Array, "b f h2 w2 c"], sigma: float
) -> Float[Array, "b f h2 w2 c"]:
    """Latents of twice the height and width at level `raised(sigma)`, float32.

    Args:
      x: at level `sigma`, below 1.
      noise: standard normal, of which the frequencies that `x` lacks are taken.
      sigma: of `x`.
    """
    rows, columns = map(_larger, x.shape[2:4])
    higher = noise - _along(rows, columns, halve(noise))
    return 2 / (1 + sigma) * (_along(rows, columns, x) + sigma * higher)


def _along(rows: np.ndarray, columns: np.ndarray, x: jax.Array) -> jax.Array:
    """The matrices applied to the height and the width, in float32."""
    return jnp.einsum("ph,qw,bfhwc->bfpqc", rows, columns, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _larger(size: int) -> np.ndarray:
    """From `size` values to twice as many of the same frequencies; orthonormal columns."""
    return (_dct(2 * size)[:size].T @ _dct(size)).astype(np.float32)


def _dct(size: int) -> Float[np.ndarray, "size size"]:
    """The orthonormal DCT-II, a row for each frequency."""
    at, frequency = np.arange(size), np.arange(size)[:, None]
    rows = np.sqrt(2 / size) * np.cos(np.pi * (at + 0.5) * frequency / size)
    rows[0] /= math.sqrt(2)
    return rows
