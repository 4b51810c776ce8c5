"""Splash attention of jax and of tokamax for TPUs; on other platforms (in tests) Pallas interprets the kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.block_sizes import LANES, Blocks, blocks
from maxdiffusion.attention.layout import pad_to_multiple, validity, zero_masked
from maxdiffusion.attention.options import DEFAULT, KernelOptions
from maxdiffusion.parallel.placement import first_device

# (q: b n s d, k: b n k d, v: b n k d, segments of q: b s and of k: b k, or None) -> (out: b n s d, lse: b n s)
_Kernel = Callable[[jax.Array, jax.Array, jax.Array, "tuple[jax.Array, jax.Array] | None"], tuple[jax.Array, jax.Array]]


def splash(
    make: Callable[[int, int, int, Blocks, KernelOptions, bool], _Kernel],
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
    *,
    options: KernelOptions = DEFAULT,
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """Computes `dense`; the kernel rounds the output to q's dtype once. Forward only.

    Tokens are padded to blocks and the head dim to lanes. The segment ids mask keys: queries and valid keys are in
    segment 1, other keys in segment 0.

    Args:
      make: returns the kernel for (heads, tokens, keys, block sizes, options, interpret).
      q: queries.
      k: keys.
      v: values.
      valid: False masks a key.
      options: settings of the kernel.
    """
    batch, tokens, heads, dim = q.shape
    keys = k.shape[1]
    device = first_device()
    sizes = blocks(device.device_kind, tokens, keys, options)

    # The kernels do not scale the logits. Scaling q here rounds it once more in bf16.
    q = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
    q = pad_to_multiple(q, 1, sizes.q)
    k, v = (pad_to_multiple(x, 1, sizes.kv) for x in (k, zero_masked(v, valid)))
    q, k, v = (pad_to_multiple(x, 3, LANES).transpose(0, 2, 1, 3) for x in (q, k, v))
    valid = validity(batch, keys, k.shape[2], valid)
    segments = None if valid is None else (jnp.ones((batch, q.shape[2]), jnp.int32), valid.astype(jnp.int32))
    out, lse = make(heads, q.shape[2], k.shape[2], sizes, options, device.platform != "tpu")(q, k, v, segments)
    out = out[:, :, :tokens, :dim].transpose(0, 2, 1, 3).astype(jnp.float32)
    lse = lse[:, :, :tokens].transpose(0, 2, 1)
    if valid is None:
        return out, lse
    some = valid.any(axis=1)[:, None, None]
    return jnp.where(some[..., None], out, 0.0), jnp.where(some, lse, -jnp.inf)


def _jax_kernel(heads: int, tokens: int, keys: int, sizes: Blocks, options: KernelOptions, interpret: bool) -> _Kernel:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    del options  # only the block sizes are used
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((tokens, keys))] * heads)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask=mask,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=sizes.q, block_kv=sizes.kv, block_kv_compute=sizes.compute
        ),
        save_residuals=True,
        interpret=interpret,
    )

    def one_example(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> tuple[jax.Array, jax.Array]:
        ids = None if segments is None else splash_attention_kernel.SegmentIds(*segments)
        out, (lse,) = kernel(q, k, v, ids)
        return out, lse

    return jax.vmap(one_example)


def _tokamax_kernel(
    heads: int, tokens: int, keys: int, sizes: Blocks, options: KernelOptions, interpret: bool
) -> _Kernel:
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        base,
        splash_attention_kernel,
        splash_attention_mask,
    )

    del heads
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.FullMask((tokens, keys)),
        config=splash_attention_kernel.SplashConfig(
            block_q=sizes.q,
            block_kv=sizes.kv,
            block_kv_compute=sizes.compute,
            use_base2_exp=bool(options.use_base2_exp),
            use_experimental_scheduler=bool(options.use_experimental_scheduler),
            interpret=interpret,
        ),
        save_residuals=True,
        q_seq_shards=1,
    )

    def one_example(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> tuple[jax.Array, jax.Array]:
        ids = None if segments is None else base.SegmentIds(*segments)
        out, stats = kernel(q, k, v, ids)
        return out, stats["logsumexp"]

    return jax.vmap(one_example)


jax_splash = functools.partial(splash, _jax_kernel)

# Base-2 exponentials, tokamax' default, are off by default here: tokamax scales q by log2(e) in q's dtype, which rounds
# q a second time in bf16 (error 8.7e-3 over 514 keys, 4.4e-3 without). Off costs 5 % on v6e by static count.
tokamax_splash = functools.partial(splash, _tokamax_kernel)
