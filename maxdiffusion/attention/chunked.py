"""Exact attention in XLA alone, with memory linear in the sequence: one head and one chunk of queries at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maxdiffusion.attention.dense import dense, exponentiate
from maxdiffusion.attention.layout import pad_to_multiple, zero_masked

# Measured on one core (docs/tpu_layouts.md): `scripts/bench_attention.py`.
CHUNK = 256
SMALL = 1 << 17


def chunked(
    q: Float[Array, "b s n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    valid: Bool[Array, "b k"] | None = None,
) -> tuple[Float[Array, "b s n d"], Float[Array, "b s n"]]:
    """Computes `dense` with `CHUNK` x k logits in memory at a time; calls `dense` for up to `SMALL` logits in all.

    bf16 inputs are converted to fp32 (exact) one head at a time: XLA's bf16 products on a CPU convert in every chunk.
    """
    batch, length, heads, _ = q.shape
    keys = k.shape[1]
    if batch * heads * length * keys <= SMALL:
        return dense(q, k, v, valid)

    chunks = -(-length // CHUNK)
    chunk = -(-length // chunks)
    padded = pad_to_multiple(q, 1, chunk)
    values = zero_masked(v, valid)
    by_head = [x.transpose(0, 2, 1, 3).reshape(batch * heads, *x.shape[1::2]) for x in (padded, k, values)]
    example = jnp.arange(batch * heads) // heads

    def one_head(args: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v = (x.astype(jnp.float32) for x in args[:3])
        mask = None if valid is None else valid[args[3]]

        def one_chunk(q: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = q @ k.T
            if mask is not None:
                logits = jnp.where(mask, logits, -jnp.inf)
            weights, total, lse = exponentiate(logits)
            return (weights @ v) / total[:, None], lse

        return jax.lax.map(one_chunk, (q * q.shape[-1] ** -0.5).reshape(chunks, chunk, -1))

    out, lse = jax.lax.map(one_head, (*by_head, example))
    out = out.reshape(batch, heads, chunks * chunk, -1)[:, :, :length].transpose(0, 2, 1, 3)
    return out, lse.reshape(batch, heads, chunks * chunk)[:, :, :length].transpose(0, 2, 1)
