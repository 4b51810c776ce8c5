"""Layout, scale, padding and masks around `kernels.flash`; on other platforms than TPUs Pallas interprets it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.block_sizes import STRIP, flash_blocks, span
from maxdiffusion.attention.layout import pad_to_multiple, validity
from maxdiffusion.attention.options import DEFAULT, LANES, KernelOptions
from maxdiffusion.kernels.flash import flash_attention
from maxdiffusion.parallel.placement import first_device

VMEM_LIMIT = 60 << 20  # bytes; TPU7x has 64 MiB, the others 128


def flash(
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
    *,
    options: KernelOptions = DEFAULT,
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """Computes `dense`; the kernel rounds the output to q's dtype once. Forward only."""
    batch, tokens, _, dim = q.shape
    keys = k.shape[1]
    device = first_device()
    limit = options.attention_vmem_limit_kib
    sizes = flash_blocks(device.device_kind, tokens, keys, options, fp32=q.dtype == jnp.float32)

    # The kernel's exponentials are to base 2. Scaling q here rounds it once more in bf16.
    q = (q.astype(jnp.float32) * (math.log2(math.e) * dim**-0.5)).astype(q.dtype)
    q, k, v = (pad_to_multiple(x, 3, LANES).transpose(0, 2, 1, 3) for x in (q, k, v))
    valid = validity(batch, keys, keys + -keys % sizes.kv, valid)
    k, v = neutralize_masked_keys(k, v, valid)
    k = jax.lax.optimization_barrier(k)  # without it XLA computes k twice for the ball and once for the kernel
    out, lse = flash_attention(
        q,
        k,
        v,
        *bounding_ball(k),
        valid,
        block_q=sizes.q,
        block_kv=sizes.kv,
        compute=sizes.compute,
        span=span(sizes),
        strip=STRIP,
        vmem_limit=VMEM_LIMIT if limit is None else limit * 1024,
        interpret=device.platform != "tpu",
    )
    out = out[..., :dim].transpose(0, 2, 1, 3).astype(jnp.float32)
    return out, lse.transpose(0, 2, 1) * math.log(2)


def neutralize_masked_keys(
    k: Float[Array, "b n k d"], v: Float[Array, "b n k d"], valid: Bool[Array, "b padded_k"] | None
) -> tuple[Float[Array, "b n padded_k d"], Float[Array, "b n padded_k d"]]:
    """Replaces masked keys by the first valid key, so that they do not raise a row's maximum; their values become 0."""
    if valid is None:
        return k, v
    seen, first = valid[:, None, :, None], valid.argmax(axis=1)[:, None, None, None]
    replacement = jnp.take_along_axis(k, first, axis=2)  # of the unpadded keys: XLA would write the padded ones apart
    padded_k, padded_v = (pad_to_multiple(x, 2, valid.shape[1]) for x in (k, v))
    return jnp.where(seen, padded_k, replacement), jnp.where(seen, padded_v, 0)


def bounding_ball(k: Float[Array, "b n k d"]) -> tuple[Float[Array, "b n d"], Float[Array, "b n"]]:
    """Center (the mean) and radius, fp32, of a ball that contains all keys of a head."""
    k = k.astype(jnp.float32)
    center = k.mean(axis=2)
    return center, jnp.sqrt(((k - center[:, :, None]) ** 2).sum(axis=3).max(axis=2))
