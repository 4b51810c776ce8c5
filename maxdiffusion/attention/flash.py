"""Layout, blocks and masks around `kernels.flash`; on other platforms than TPUs Pallas interprets it."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention import eight_bits
from maxdiffusion.attention.block_sizes import STRIP, flash_blocks, span
from maxdiffusion.attention.layout import pad_to_multiple, validity
from maxdiffusion.attention.options import DEFAULT, LANES, KernelOptions
from maxdiffusion.kernels.flash import bounding_ball, flash_attention
from maxdiffusion.parallel.placement import first_device

VMEM_LIMIT = 60 << 20  # bytes; TPU7x has 64 MiB, the others 128


def flash(
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
    other: tuple[Float[Array, "b s n d"], Float[Array, "b s n"]] | None = None,
    *,
    whole: bool = True,
    options: KernelOptions = DEFAULT,
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """Computes `dense`, merged with `other`, the result for other keys. Takes q and k of `eight_bits`. Forward only.

    The output is rounded to v's dtype, or fp32 if it is not the `whole` and another hop of a ring follows.
    """
    batch, tokens, _, dim = q.shape
    keys = k.shape[1]
    device = first_device()
    limit = options.attention_vmem_limit_kib
    sizes = flash_blocks(device.device_kind, tokens, keys, options, fp32=v.dtype == jnp.float32)

    q, k, v = (pad_to_multiple(x, 3, LANES).transpose(0, 2, 1, 3) for x in (q, k, v))
    if other is not None:
        out, lse = other
        out, lse = pad_to_multiple(out, 3, LANES).transpose(0, 2, 1, 3), lse.transpose(0, 2, 1) / math.log(2)
        other = out, lse
    valid = validity(batch, keys, keys + -keys % sizes.kv, valid)
    interpret = device.platform != "tpu"
    out, lse = flash_attention(
        q,
        k,
        v,
        *bounding_ball(k, valid, block=sizes.kv, interpret=interpret),
        valid,
        other,
        dtype=v.dtype if whole else jnp.float32,
        scale=1.0 if q.dtype == eight_bits.DTYPE else math.log2(math.e) * dim**-0.5,
        block_q=sizes.q,
        block_kv=sizes.kv,
        compute=sizes.compute,
        span=span(sizes),
        strip=STRIP,
        vmem_limit=VMEM_LIMIT if limit is None else limit * 1024,
        interpret=interpret,
    )
    return out[..., :dim].transpose(0, 2, 1, 3), lse.transpose(0, 2, 1) * math.log(2)
