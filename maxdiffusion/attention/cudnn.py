"""cuDNN's flash attention on GPUs."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from maxdiffusion.attention.kernels import KERNELS
from maxdiffusion.attention.layout import pad_to_multiple, zero_masked
from maxdiffusion.errors import UserError


def cudnn_flash(
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """Computes `dense` for bf16 and fp16; the kernel rounds the output to q's dtype once.

    The kernel masks by a count of keys (a mask as bias would take b s k values). Attention does not depend on the order
    of keys, so the valid ones are moved to the front first.

    The primitive is called directly: jax.nn.dot_product_attention rounds the log-sum-exp to q's dtype, which is too
    coarse for merging.

    Raises:
      UserError: q has another dtype.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    row = KERNELS["cudnn_flash"]
    if not row.takes(str(q.dtype)):
        raise UserError(f"The kernel {row.name} takes {' or '.join(row.dtypes)}, not {q.dtype}.")
    scale, dim = q.shape[-1] ** -0.5, q.shape[-1]
    masked: dict[str, Any] = {}
    if valid is not None:
        k, v, count = valid_first(k, zero_masked(v, valid), valid)
        masked = {
            "mask_type": MaskType.PADDING,
            "q_seqlen": jnp.full(q.shape[:1], q.shape[1], jnp.int32),
            "kv_seqlen": jnp.maximum(count, 1),  # rows without a key are set to 0 below
        }
    q, k, v = (pad_to_multiple(x, 3, 8) for x in (q, k, v))
    out, lse = dot_product_attention(q, k, v, scale=scale, return_residual=True, **masked)
    out, lse = out[..., :dim].astype(jnp.float32), lse.transpose(0, 2, 1)
    if valid is None:
        return out, lse
    some = (count > 0)[:, None, None]
    return jnp.where(some[..., None], out, 0.0), jnp.where(some, lse, -jnp.inf)


def valid_first(
    k: Float[Array, "b k n d"], v: Float[Array, "b k n d"], valid: Bool[Array, "b k"]
) -> tuple[Float[Array, "b k n d"], Float[Array, "b k n d"], Int[Array, " b"]]:
    """Keys and values with the valid ones in front, and the number of valid ones."""
    order = jnp.argsort(~valid, axis=1, stable=True)[:, :, None, None]
    k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
    return k, v, valid.sum(axis=1, dtype=jnp.int32)
