"""Forward flash attention for TPUs, transposed: queries lie along lanes, keys along sublanes.

With S^T = K Q^T and O^T = V^T P^T the second product contracts over keys, which fills a 256-wide matrix unit at a head
dim of 128 (P V would run at half rate): the ceiling is 2/3 of peak, not 1/2. The maximum and the sum of a row are then
taken over sublanes, one statistic per row; the sum is a product of P with ones, beside V.

The online softmax is Milakov and Gimelshein's (arXiv 1805.02867), in blocks as by Dao et al. (arXiv 2205.14135). Where
a bound of each row's logits is tight enough it takes the maximum's place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

LANES = 128
ONES = 16  # rows of ones beside V^T, whose product with P is the sum: a tile of bf16
AHEAD = 5  # tiles of logits that are under way while one is exponentiated
LOWEST = -1e30  # the maximum before the first key; finite, so that differences of two are no NaN
# Looseness of a bound up to which its sums are exact: they are then at least 2^-88, and what underflows in one, 2^-126
# for each of at most 2^17 keys, is less than 2^-20 of it.
LOOSEST = 88.0


def flash_attention(
    q: Float[Array, "b n s d"],
    k: Float[Array, "b n k d"],
    v: Float[Array, "b n k d"],
    mean: Float[Array, "b n d"],
    radius: Float[Array, "b n"],
    valid: Bool[Array, "b k"] | None = None,
    *,
    block_q: int,
    block_kv: int,
    compute: int,
    span: int,
    strip: int,
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
      mean: fp32, of the keys, or any other point amid them.
      radius: fp32, how far from it the farthest key is. No logit of a query exceeds q mean + |q| radius (Cauchy and
        Schwarz). In a block of queries none of which has |q| radius above `LOOSEST` that bound takes the place of a
        running maximum, which spares the vector unit much of its work.
      valid: the keys that count. The sum leaves out the others, but not maximum and output: their values must be 0, and
        their logits no larger than the row's largest. Of a block, what follows its last such key is skipped.
      block_q: queries that a grid step holds, a multiple of 128, as d is. The last step's may reach beyond s: no query
        sees another.
      block_kv: keys that a grid step holds; divides k.
      compute: keys that one product takes, a multiple of 128.
      span: keys that a round of the loop takes, unrolled, a multiple of compute; a rest takes rounds of `compute`.
      strip: queries that one product takes: the width of the matrix unit.
      vmem_limit: bytes of vector memory; the compiler's default where None.
      interpret: without a TPU.
    """
    batch, heads, tokens, dim = q.shape
    keys = k.shape[2]
    prefetched = [radius]
    inputs, weights = [q, k, v, mean[:, :, None]], []
    if valid is not None:
        prefetched.append(_counts(valid, block_kv, compute))
        inputs.append(valid.astype(v.dtype)[:, None])
        weights = [pl.BlockSpec((1, 1, block_kv), lambda b, h, i, j, *_: (b, 0, j))]
    of_rows = pl.BlockSpec((1, 1, 1, block_q), lambda b, h, i, j, *_: (b, h, 0, i))
    of_queries = pl.BlockSpec((1, 1, block_q, dim), lambda b, h, i, j, *_: (b, h, i, 0))
    of_keys = pl.BlockSpec((1, 1, block_kv, dim), lambda b, h, i, j, *_: (b, h, j, 0))
    of_mean = pl.BlockSpec((1, 1, 1, dim), lambda b, h, i, j, *_: (b, h, 0, 0))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, compute=compute, span=span, strip=strip, masked=valid is not None),
        name=f"flash_attention_{block_q}_{block_kv}",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, heads, pl.cdiv(tokens, block_q), keys // block_kv),
            in_specs=[of_queries, of_keys, of_keys, of_mean, *weights],
            out_specs=[of_queries, of_rows],
            scratch_shapes=[
                pltpu.VMEM((dim + ONES, block_q), jnp.float32),
                pltpu.VMEM((1, block_q), jnp.float32),
                pltpu.VMEM((AHEAD, compute, strip), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
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


def _counts(valid: Bool[Array, "b k"], block: int, compute: int) -> Int[Array, "b blocks"]:
    """How many parts of each block there are up to its last key that counts."""
    some = valid.reshape(valid.shape[0], -1, block // compute, compute).any(-1)
    return jnp.max(some * jnp.arange(1, block // compute + 1), axis=-1).astype(jnp.int32)


def _kernel(*refs: Any, tokens: int, compute: int, span: int, strip: int, masked: bool) -> None:
    """One block of queries with one of keys.

    refs: radius, [counts], q, k, v, mean, [valid], out, lse, sums of outputs, maxima, logits under way, sound.
    """
    radius_ref, counts_ref, *arrays = refs if masked else (refs[0], None, *refs[1:])
    q_ref, k_ref, v_ref, mean_ref, *valid_ref, out_ref, lse_ref, acc_ref, top_ref, waiting_ref, sound_ref = arrays
    example, head, block, step = (pl.program_id(axis) for axis in range(4))
    count = counts_ref[example, step] if masked else k_ref.shape[2] // compute

    @pl.when(step == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        rows = tokens - block * q_ref.shape[2]
        looseness = _bound(q_ref, mean_ref, radius_ref[example, head], rows, top_ref)
        sound_ref[0] = (looseness < LOOSEST).astype(jnp.int32)

        @pl.when(looseness >= LOOSEST)
        def _() -> None:
            top_ref[...] = jnp.full_like(top_ref, LOWEST)

    sound = sound_ref[0] == 1
    keys_ref = valid_ref[0] if masked else None
    tiles = _Tiles(q_ref, k_ref, v_ref, keys_ref, acc_ref, top_ref, waiting_ref, compute, strip)

    def add(parts: int, first: Any) -> None:
        pl.when(sound)(lambda: tiles.add(first, parts, running=False))
        pl.when(~sound)(lambda: tiles.add(first, parts, running=True))

    @pl.when(count > 0)
    def _() -> None:
        parts = span // compute
        rounds = count // parts
        tiles.begin()
        jax.lax.fori_loop(0, rounds, lambda number, _: add(parts, number * parts), None)
        if parts > 1:
            jax.lax.fori_loop(rounds * parts, count, lambda number, _: add(1, number), None)

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        dim = v_ref.shape[3]
        total = acc_ref[dim : dim + 1]
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        out_ref[0, 0] = (acc_ref[:dim] / safe).T.astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.where(some, top_ref[...] + jnp.log2(safe), -jnp.inf)


def _bound(q_ref: Any, mean_ref: Any, radius: jax.Array, rows: jax.Array, top_ref: Any) -> jax.Array:
    """Writes what no logit of a row exceeds; returns by how much at most it exceeds the largest one of the `rows`.

    The largest logit of a row is no less than the mean one, q mean.
    """

    def some(number: jax.Array, loosest: jax.Array) -> jax.Array:
        first = pl.multiple_of(number * LANES, LANES)
        q = q_ref[0, 0, pl.ds(first, LANES), :].astype(jnp.float32)
        middle, square = ((q * other).T.sum(axis=0, keepdims=True) for other in (mean_ref[0, 0], q))
        reach = jnp.sqrt(square) * radius
        top_ref[:, pl.ds(first, LANES)] = middle + reach
        real = first + jax.lax.broadcasted_iota(jnp.int32, reach.shape, 1) < rows
        return jnp.maximum(loosest, jnp.where(real, reach, 0.0))

    return jax.lax.fori_loop(0, q_ref.shape[2] // LANES, some, jnp.zeros((1, LANES), jnp.float32)).max()


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The products of one block: tiles of `compute` keys, a part of the block, by a strip of queries.

    The compiler keeps the order of products, so the logits of a tile are written `AHEAD` tiles before their softmax:
    the vector unit then works beside the matrix unit. Those of the next part's first tiles wait in `waiting`.
    """

    q: Any
    k: Any
    v: Any
    valid: Any
    acc: Any
    top: Any
    waiting: Any
    compute: int
    strip: int

    def begin(self) -> None:
        """The logits of the first tiles."""
        for slot, tile in enumerate(self._of(0)[:AHEAD]):
            self._wait(slot, self._logits(*tile))

    def add(self, first: Any, parts: int, *, running: bool) -> None:
        """Adds the attention over some parts to the accumulators, unrolled; the maximum is a running one or stays."""
        tiles = [tile for part in range(parts) for tile in self._of(first + part)]
        last = self.k.shape[2] // self.compute - 1
        after = self._of(jnp.minimum(first + parts, last))[:AHEAD]  # computed in vain behind the last part
        under_way = [self.waiting[slot, :, : strip.stop - strip.start] for slot, (_, strip) in enumerate(after)]
        for (keys, strip), coming in zip(tiles, [*tiles, *after][len(after) :], strict=True):
            under_way.append(self._logits(*coming))
            s, top, acc = under_way.pop(0), self.top[:, strip], self.acc[:, strip]
            if running:
                higher = jnp.maximum(top, s.max(axis=0, keepdims=True))
                acc *= jnp.exp2(top - higher)
                self.top[:, strip] = top = higher
            weights = jnp.exp2(s - top).astype(self.v.dtype)
            self.acc[:, strip] = acc + self._product(self._values(keys), weights, ((1,), (0,)))
        for slot, s in enumerate(under_way):
            self._wait(slot, s)

    def _of(self, part: Any) -> list[tuple[Any, slice]]:
        """(keys, strip of queries) of a part's tiles."""
        keys = pl.ds(pl.multiple_of(part * self.compute, LANES), self.compute)
        size = self.q.shape[2]
        return [(keys, slice(start, min(start + self.strip, size))) for start in range(0, size, self.strip)]

    def _wait(self, slot: int, s: jax.Array) -> None:
        self.waiting[slot, :, : s.shape[1]] = s

    def _values(self, keys: Any) -> jax.Array:
        """V^T, and below it rows whose product with P is its sum over the keys that count."""
        shape = (ONES, self.compute)
        ones = jnp.ones(shape, self.v.dtype) if self.valid is None else jnp.broadcast_to(self.valid[0, :, keys], shape)
        return jnp.concatenate([self.v[0, 0, keys, :].T, ones])

    def _logits(self, keys: Any, strip: slice) -> jax.Array:
        return self._product(self.k[0, 0, keys, :], self.q[0, 0, strip, :], ((1,), (1,)))

    def _product(self, a: jax.Array, b: jax.Array, contracting: tuple[tuple[int], tuple[int]]) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if self.q.dtype == jnp.float32 else None
        return jax.lax.dot_general(
            a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
