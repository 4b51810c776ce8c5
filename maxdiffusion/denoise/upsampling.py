"""The change from half to whole height and width within a run, in the frequencies of a cosine transform.

Latents at noise level s become those of twice the height and width at level 2 s / (1 + s): their frequencies (an
orthonormal DCT-II of each frame) are the lowest ones of the larger frame, whose others are fresh noise of level s, and
all are scaled by 2 / (1 + s). The transform to twice the size halves the values of the signal and keeps the level of
the noise, which is why the level rises. Reference, also of `level`: `dct_rewind` of SGLang (sgl-project/sglang#27524).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from maxdiffusion.denoise.noise import step_noise


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


def upsample(
    x: Float[Array, "b f h w c"], keys: UInt32[Array, "b 2"], step: int, sigma: float
) -> Float[Array, "b f h2 w2 c"]:
    """Latents of twice the height and width at level `raised(sigma)`, float32.

    Args:
      x: at level `sigma`.
      keys: of the videos (`noise.step_keys`); the noise is that of `step`.
      step: the number of the step that follows.
      sigma: below 1.
    """
    _, f, h, w, c = x.shape
    noise = sigma * step_noise(keys, jnp.int32(step), (f, 2 * h, 2 * w, c))
    (up_h, low_h), (up_w, low_w) = _matrices(h), _matrices(w)

    def both(rows: np.ndarray, columns: np.ndarray, a: jax.Array) -> jax.Array:
        return jnp.einsum("ph,qw,bfhwc->bfpqc", rows, columns, a, precision=jax.lax.Precision.HIGHEST)

    return 2 / (1 + sigma) * (both(up_h, up_w, x.astype(jnp.float32)) + noise - both(low_h, low_w, noise))


def _matrices(size: int) -> tuple[np.ndarray, np.ndarray]:
    """From `size` values to twice as many by their frequencies, and of twice as many the part of those frequencies."""
    small, large = _dct(size), _dct(2 * size)[:size]
    return (large.T @ small).astype(np.float32), (large.T @ large).astype(np.float32)


def _dct(size: int) -> Float[np.ndarray, "size size"]:
    """The orthonormal DCT-II, a row for each frequency."""
    at, frequency = np.arange(size), np.arange(size)[:, None]
    rows = np.sqrt(2 / size) * np.cos(np.pi * (at + 0.5) * frequency / size)
    rows[0] /= math.sqrt(2)
    return rows
