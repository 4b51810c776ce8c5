"""Our flash kernel as a local kernel: layout, scale, padding and masks. Elsewhere than on TPUs Pallas interprets it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.block_sizes import STRIP, flash_blocks, span
from maxdiffusion.attention.layout import pad_to_multiple, validity
from maxdiffusion.attention.options import DEFAULT, LANES, KernelOptions
from maxdiffusion.parallel import current

VMEM_LIMIT = 60 << 20  # bytes; TPU7x has 64 MiB, the others 128


def flash(
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
    *,
    options: KernelOptions = DEFAULT,
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """As `dense`, but the output is rounded to q's dtype once, in the kernel; forward only."""
    from maxdiffusion.kernels.flash import flash_attention  # Pallas takes a third of a second to import

    batch, tokens, _, dim = q.shape
    keys = k.shape[1]
    placement = current()
    device = jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]
    sizes = flash_blocks(device.device_kind, tokens, keys, options, fp32=q.dtype == jnp.float32)

    # The kernel's exponentials are to base 2. In bf16 this rounds q once more.
    q = (q.astype(jnp.float32) * (math.log2(math.e) * dim**-0.5)).astype(q.dtype)
    q, k, v = (pad_to_multiple(x, 3, LANES).transpose(0, 2, 1, 3) for x in (q, k, v))
    valid = validity(batch, keys, keys + -keys % sizes.kv, valid)
    k, v = harmless(k, v, valid)
    k = jax.lax.optimization_barrier(k)  # else they are made twice for their extent and once for the kernel
    out, lse = flash_attention(
        q,
        k,
        v,
        *extent(k),
        valid,
        block_q=sizes.q,
        block_kv=sizes.kv,
        compute=sizes.compute,
        span=span(sizes),
        strip=STRIP,
        vmem_limit=VMEM_LIMIT if options.vmem_limit_kib is None else options.vmem_limit_kib * 1024,
        interpret=device.platform != "tpu",
    )
    out = out[..., :dim].transpose(0, 2, 1, 3).astype(jnp.float32)
    return out, lse.transpose(0, 2, 1) * math.log(2)


def harmless(
    k: Float[Array, "b n k d"], v: Float[Array, "b n k d"], valid: Bool[Array, "b padded_k"] | None
) -> tuple[Float[Array, "b n padded_k d"], Float[Array, "b n padded_k d"]]:
    """In place of keys that do not count the first that does, whose logits the largest is no less than; values of 0."""
    if valid is None:
        return k, v
    seen, first = valid[:, None, :, None], valid.argmax(axis=1)[:, None, None, None]
    instead = jnp.take_along_axis(k, first, axis=2)  # not of the padded keys, which would then be made apart
    padded_k, padded_v = (pad_to_multiple(x, 2, valid.shape[1]) for x in (k, v))
    return jnp.where(seen, padded_k, instead), jnp.where(seen, padded_v, 0)


def extent(k: Float[Array, "b n k d"]) -> tuple[Float[Array, "b n d"], Float[Array, "b n"]]:
    """The mean of the keys and how far from it the farthest is, fp32."""
    k = k.astype(jnp.float32)
    mean = k.mean(axis=2)
    return mean, jnp.sqrt(((k - mean[:, :, None]) ** 2).sum(axis=3).max(axis=2))
