"""cuDNN's flash attention on GPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.layout import pad_to_multiple
from maxdiffusion.attention.plan import DTYPES
from maxdiffusion.errors import UserError


def cudnn_flash(
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """As `dense`, for bf16 and fp16; the output is rounded to q's dtype once, in the kernel.

    The kernel masks by a count of keys (a mask as bias would take b s k values). The order of keys does not matter to
    attention, so the valid ones are moved to the front first.

    Called below jax.nn.dot_product_attention, which rounds the log-sum-exp to q's dtype: too coarse to merge by.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    if str(q.dtype) not in DTYPES["cudnn_flash"]:
        raise UserError(f"The kernel cudnn_flash takes {' or '.join(DTYPES['cudnn_flash'])}, not {q.dtype}.")
    scale, dim = q.shape[-1] ** -0.5, q.shape[-1]
    masked: dict[str, Any] = {}
    if valid is not None:
        k, v, count = _valid_first(k, v, valid)
        masked = {
            "mask_type": MaskType.PADDING,
            "q_seqlen": jnp.full(q.shape[:1], q.shape[1], jnp.int32),
            "kv_seqlen": jnp.maximum(count, 1),  # a row without a key is emptied below
        }
    q, k, v = (pad_to_multiple(x, 3, 8) for x in (q, k, v))
    out, lse = dot_product_attention(q, k, v, scale=scale, return_residual=True, **masked)
    out, lse = out[..., :dim].astype(jnp.float32), lse.transpose(0, 2, 1)
    if valid is None:
        return out, lse
    some = (count > 0)[:, None, None]
    return jnp.where(some[..., None], out, 0.0), jnp.where(some, lse, -jnp.inf)


def _valid_first(k: jax.Array, v: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys and values with the valid ones in front, and how many those are."""
    order = jnp.argsort(~valid, axis=1, stable=True)[:, :, None, None]
    k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
    return k, v, valid.sum(axis=1, dtype=jnp.int32)
