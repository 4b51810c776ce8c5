"""Self-attention with queries and keys in 8 bits, e4m3; softmax and values stay as they are.

The keys are centred by their mean, which changes no weight (SageAttention, Zhang et al., arXiv 2410.02367). e4m3 has a
range of 2^18 at three bits of mantissa, so that no scale per token or block is needed. Weights are not rounded: with a
bound in place of the row's maximum they may all be as small as 2^-88, where e4m3 has only zero.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.hardware.quantization import LARGEST

DTYPE = jnp.float8_e4m3fn
_LARGEST = LARGEST[jnp.dtype(DTYPE).name]


def eight_bits(local: Callable[..., Any], *, native: bool) -> Callable[..., Any]:
    """`local` on q and centred k in e4m3.

    Both are multiplied by sqrt(log2(e) / sqrt(d)) first, and saturate at 448: at a head dim of 128 where they exceed
    1,255.

    Args:
      local: the kernel; further arguments are passed on to it.
      native: whether it takes q and k in e4m3, scaled so, with logits to base 2; otherwise they are widened again.
    """

    def attend(
        q: Float[Array, "b s n d"],
        k: Float[Array, "b k n d"],
        v: Float[Array, "b k n d"],
        valid: Bool[Array, "b k"] | None = None,
        other: tuple[Float[Array, "b s n d"], Float[Array, "b s n"]] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
        gain = math.sqrt(math.log2(math.e) / math.sqrt(q.shape[-1]))
        wide = k.astype(jnp.float32)
        seen = None if valid is None else valid[:, :, None, None]
        center = jnp.nan_to_num(jnp.mean(wide, axis=1, keepdims=True, where=seen))  # of no key: 0
        rounded_q, rounded_k = (_round(x * gain) for x in (q.astype(jnp.float32), wide - center))
        if not native:
            rounded_q, rounded_k = ((x.astype(jnp.float32) / gain).astype(q.dtype) for x in (rounded_q, rounded_k))
        shift = jnp.einsum("bsnd,bnd->bsn", q.astype(jnp.float32), center[:, 0]) / math.sqrt(q.shape[-1])
        more = [] if other is None else [(other[0], other[1] - shift)]
        out, lse = local(rounded_q, rounded_k, v, valid, *more, **options)
        return out, lse + shift

    return attend


def _round(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -_LARGEST, _LARGEST).astype(DTYPE)
