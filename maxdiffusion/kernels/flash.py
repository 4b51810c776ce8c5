"""Forward flash attention for TPUs, transposed: queries lie along lanes, keys along sublanes.

With S^T = K Q^T and O^T = V^T P^T the second product contracts over keys, which fills a 256-wide matrix unit at a head
dim of 128 (P V would run at half rate): the ceiling is 2/3 of peak, not 1/2. The maximum and the sum of a row are then
taken over sublanes, one statistic per row; the sum is a product of P with ones, beside V.

The online softmax is Milakov and Gimelshein's (arXiv 1805.02867), in blocks as by Dao et al. (arXiv 2205.14135). Where
a bound of each row's logits is tight enough it takes the maximum's place.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

LANES = 128
STRIP = 256  # queries that one product takes: the width of the matrix unit
ONES = 16  # rows of ones beside V^T, whose product with P is the sum: a tile of bf16
AHEAD = 5  # tiles of logits that are under way while one is exponentiated
LOWEST = -1e30  # added to the logits of keys that do not count; finite, so that differences of two are no NaN

EMPTY, WHOLE, MIXED = range(3)  # whether none, all or some keys of a block count


def flash_attention(
    q: Float[Array, "b n s d"],
    k: Float[Array, "b n k d"],
    v: Float[Array, "b n k d"],
    bound: Float[Array, "b n s"],
    sound: Bool[Array, "b n"],
    valid: Bool[Array, "b k"] | None = None,
    *,
    block_q: int,
    block_kv: int,
    compute: int,
    vmem_limit: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b n s d"], Float[Array, "b n s"]]:
    """softmax(q k^T) v with exponentials to base 2, and the base-2 logarithm of its sum.

    The output has q's dtype; logits, maxima, sums and the second result are fp32. A row without a valid key gives 0
    and -inf. No gradient.

    Args:
      q: scaled by the caller, by log2(e) / sqrt(d) for the usual attention.
      k: keys.
      v: values.
      bound: fp32, no less than any logit of the row, but for rounding.
      sound: the heads in which the bound takes the place of a running maximum, which spares the vector unit much of its
        work. A row's largest logit must be near enough to it (within 88) that the sum does not underflow.
      valid: the keys that count. A mask costs where only some keys of a block count; blocks without one are skipped.
      block_q: queries that a grid step holds; divides s and is a multiple of 128, as d is.
      block_kv: keys that a grid step holds; divides k and is a multiple of 128.
      compute: keys that one product takes, a multiple of 128; the last of a block may be smaller.
      vmem_limit: bytes of vector memory; the compiler's default where None.
      interpret: without a TPU.
    """
    batch, heads, tokens, dim = q.shape
    keys = k.shape[2]
    steps = keys // block_kv
    prefetched = [sound.astype(jnp.int32)]
    inputs, biases = [q, k, v, bound[:, :, None]], []
    if valid is not None:
        prefetched.append(_states(valid, block_kv))
        inputs.append(jnp.where(valid, 0.0, LOWEST).astype(q.dtype)[:, None])
        biases = [pl.BlockSpec((1, 1, block_kv), lambda b, h, i, j, *_: (b, 0, j))]
    of_rows = pl.BlockSpec((1, 1, 1, block_q), lambda b, h, i, j, *_: (b, h, 0, i))
    of_queries = pl.BlockSpec((1, 1, block_q, dim), lambda b, h, i, j, *_: (b, h, i, 0))
    of_keys = pl.BlockSpec((1, 1, block_kv, dim), lambda b, h, i, j, *_: (b, h, j, 0))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, compute=compute, masked=valid is not None),
        name=f"flash_attention_{block_q}_{block_kv}",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, heads, tokens // block_q, steps),
            in_specs=[of_queries, of_keys, of_keys, of_rows, *biases],
            out_specs=[of_queries, of_rows],
            scratch_shapes=[
                pltpu.VMEM((dim + ONES, block_q), jnp.float32),
                pltpu.VMEM((1, block_q), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, tokens), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        interpret=interpret,
    )(*prefetched, *inputs)
    return out, lse[:, :, 0]


def _states(valid: Bool[Array, "b k"], block: int) -> Int[Array, "b blocks"]:
    valid = valid.reshape(valid.shape[0], -1, block)
    return jnp.where(valid.all(-1), WHOLE, jnp.where(valid.any(-1), MIXED, EMPTY)).astype(jnp.int32)


def _kernel(*refs: Any, compute: int, masked: bool) -> None:
    """One block of queries with one of keys.

    refs: sound, [states], q, k, v, bound, [bias], out, lse, sums of outputs, maxima.
    """
    sound_ref, states_ref, *arrays = refs if masked else (refs[0], None, *refs[1:])
    q_ref, k_ref, v_ref, bound_ref, *bias_ref, out_ref, lse_ref, acc_ref, top_ref = arrays
    example, head, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    sound = sound_ref[example, head] == 1
    state = states_ref[example, step] if masked else WHOLE

    @pl.when(step == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        top_ref[...] = jnp.where(sound, bound_ref[0, 0], LOWEST)

    attend = functools.partial(_attend, q_ref, k_ref, v_ref, acc_ref, top_ref, compute)
    pl.when((state == WHOLE) & sound)(lambda: attend(None, running=False))
    pl.when((state == WHOLE) & ~sound)(lambda: attend(None, running=True))
    if masked:  # one of a few blocks; over a sound bound no maximum runs away
        pl.when(state == MIXED)(lambda: attend(*bias_ref, running=True))

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        dim = v_ref.shape[3]
        total = acc_ref[dim : dim + 1]
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        out_ref[0, 0] = (acc_ref[:dim] / safe).T.astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.where(some, top_ref[...] + jnp.log2(safe), -jnp.inf)


def _attend(
    q_ref: Any, k_ref: Any, v_ref: Any, acc_ref: Any, top_ref: Any, compute: int, bias_ref: Any, *, running: bool
) -> None:
    """Adds the attention over one block of keys to the accumulators; the maximum is a running one or stays.

    Unrolled in tiles of `compute` keys by a strip of queries. The compiler keeps the order of products, so the logits
    of a tile are written `AHEAD` tiles before their softmax: the vector unit then works beside the matrix unit.
    """
    block_q, block_kv = q_ref.shape[2], k_ref.shape[2]
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    product = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    strips = [slice(s, min(s + STRIP, block_q)) for s in range(0, block_q, STRIP)]
    parts = [slice(k, min(k + compute, block_kv)) for k in range(0, block_kv, compute)]
    tiles = [(part, strip) for part in parts for strip in range(len(strips))]
    acc = [acc_ref[:, strip] for strip in strips]
    top = [top_ref[:, strip] for strip in strips]

    def logits(tile: tuple[Any, int]) -> jax.Array:
        part, strip = tile
        s = product(k_ref[0, 0, part, :], q_ref[0, 0, strips[strip], :], (((1,), (1,)), ((), ())))
        if bias_ref is not None:
            # The bias lies along lanes; a product with ones lays it along sublanes.
            bias = jnp.broadcast_to(bias_ref[0, :, part], (ONES, s.shape[0]))
            s += product(bias, jnp.ones((ONES, s.shape[1]), bias.dtype), (((0,), (0,)), ((), ())))
        return s

    under_way = []
    for number in range(len(tiles) + AHEAD):
        if number < len(tiles):
            under_way.append(logits(tiles[number]))
        if number < AHEAD:
            continue
        s = under_way.pop(0)
        part, strip = tiles[number - AHEAD]
        values = jnp.concatenate([v_ref[0, 0, part, :].T, jnp.ones((ONES, s.shape[0]), v_ref.dtype)])
        if running:
            higher = jnp.maximum(top[strip], s.max(axis=0, keepdims=True))
            acc[strip] *= jnp.exp2(top[strip] - higher)
            top[strip] = higher
        weights = jnp.exp2(s - top[strip]).astype(v_ref.dtype)
        acc[strip] += product(values, weights, (((1,), (0,)), ((), ())))
    for strip, columns in enumerate(strips):
        acc_ref[:, columns] = acc[strip]
        if running:
            top_ref[:, columns] = top[strip]
