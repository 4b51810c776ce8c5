"""Splash attention on TPUs, from jax and from tokamax. Elsewhere (in tests) Pallas interprets the same kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from maxdiffusion.attention.block_sizes import LANES, Blocks, blocks
from maxdiffusion.attention.layout import pad_to_multiple, validity
from maxdiffusion.attention.options import DEFAULT, KernelOptions
from maxdiffusion.parallel import current

# (q: b n s d, k: b n k d, v: b n k d, segments of q: b s and of k: b k, or None) -> (out: b n s d, lse: b n s)
_Kernel = Callable[[jax.Array, jax.Array, jax.Array, "tuple[jax.Array, jax.Array] | None"], tuple[jax.Array, jax.Array]]


def jax_splash(
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
    *,
    options: KernelOptions = DEFAULT,
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """As `dense`, but the output is rounded to q's dtype once, in the kernel; forward only."""
    return _run(_jax_kernel, q, k, v, valid, options)


def tokamax_splash(
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
    *,
    options: KernelOptions = DEFAULT,
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """As `jax_splash`, with tokamax' kernel.

    Its base-2 exponentials, its own default, are off unless asked for: it scales q by log2(e) in q's dtype, which in
    bf16 rounds q a second time (8.7e-3 off over 514 keys, without it 4.4e-3). That costs 5 % on v6e by static count.
    """
    return _run(_tokamax_kernel, q, k, v, valid, options)


def _run(
    make: Callable[[int, int, int, Blocks, KernelOptions, bool], _Kernel],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    options: KernelOptions,
) -> tuple[jax.Array, jax.Array]:
    """Pads tokens to blocks and the head dim to lanes, masks the padded keys, and empties rows without a key."""
    batch, tokens, heads, dim = q.shape
    keys = k.shape[1]
    placement = current()
    device = jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]
    sizes = blocks(device.device_kind, tokens, keys, options)

    # The kernels do not scale the logits. In bf16 this rounds q once more.
    q = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
    q = pad_to_multiple(q, 1, sizes.q)
    k, v = (pad_to_multiple(x, 1, sizes.kv) for x in (k, v))
    q, k, v = (pad_to_multiple(x, 3, LANES).transpose(0, 2, 1, 3) for x in (q, k, v))
    valid = validity(batch, keys, k.shape[2], valid)
    segments = None if valid is None else _segments(q.shape[2], valid)
    out, lse = make(heads, q.shape[2], k.shape[2], sizes, options, device.platform != "tpu")(q, k, v, segments)
    out = out[:, :, :tokens, :dim].transpose(0, 2, 1, 3).astype(jnp.float32)
    lse = lse[:, :, :tokens].transpose(0, 2, 1)
    if valid is None:
        return out, lse
    some = valid.any(axis=1)[:, None, None]
    return jnp.where(some[..., None], out, 0.0), jnp.where(some, lse, -jnp.inf)


def _segments(tokens: int, valid: Bool[Array, "b k"]) -> tuple[Int[Array, "b s"], Int[Array, "b k"]]:
    """Every query is in segment 1; a key is in it if it counts, and otherwise in segment 0."""
    return jnp.ones((valid.shape[0], tokens), jnp.int32), valid.astype(jnp.int32)


def _jax_kernel(heads: int, tokens: int, keys: int, sizes: Blocks, options: KernelOptions, interpret: bool) -> _Kernel:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    del options  # the sizes are all it takes
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
            use_base2_exp=bool(options.base2_exp),
            use_experimental_scheduler=bool(options.scheduler),
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
