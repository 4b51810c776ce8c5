"""Forward flash attention for TPUs, transposed: queries lie along lanes, keys along sublanes.

With S^T = K Q^T and O^T = V^T P^T the second product contracts over keys, which fills a 256-wide matrix unit at a head
dim of 128 (P V would run at half rate): the ceiling is 2/3 of peak, not 1/2. The maximum and the sum of a row are then
taken over sublanes, one statistic per row; the sum is a product of P with ones, next to V.

The online softmax is Milakov and Gimelshein's (arXiv 1805.02867), in blocks as by Dao et al. (arXiv 2205.14135). A
bound of each row's logits replaces its running maximum where it is tight enough.
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
ONES = 16  # rows of ones below V^T, whose product with P is the row sum: a tile of bf16
PIPELINE_DEPTH = 5  # tiles whose logits are in flight while the softmax of an earlier tile is computed
LOWEST = -1e30  # the maximum before the first key; finite, because the difference of two -inf is NaN
# Looseness of a bound up to which its sums are exact: a sum is then at least 2^-88, and the terms that underflow, less
# than 2^-126 for each of at most 2^17 keys, add up to less than 2^-20 of it.
LOOSEST = 88.0


def flash_attention(
    q: Float[Array, "b n s d"],
    k: Float[Array, "b n k d"],
    v: Float[Array, "b n k d"],
    center: Float[Array, "b n d"],
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
    and -inf, a query with NaN makes its row NaN alone. No gradient.

    Args:
      q: queries, scaled by the caller: by log2(e) / sqrt(d) for the usual attention.
      k: keys.
      v: values.
      center: fp32, the mean of the keys or another point of their convex hull.
      radius: fp32, the largest distance of a key from the center. No logit of a query exceeds q center + |q| radius
        (Cauchy and Schwarz). If |q| radius is less than `LOOSEST` for all queries of a block, that bound takes the
        place of a running maximum, which saves the vector unit much of its work.
      valid: False leaves a key out of the sum, but not out of maximum and output: its value must be 0, and its logits
        must not exceed the row's largest. In a block of keys the parts after the last valid key are skipped.
      block_q: queries per grid step, a multiple of 128, as d is. The last block may reach beyond s: queries are
        independent.
      block_kv: keys per grid step; divides k.
      compute: keys per matrix product, a multiple of 128.
      span: keys per round of the unrolled loop, a multiple of compute; a rest takes rounds of `compute` keys.
      strip: queries per matrix product: the width of the matrix unit.
      vmem_limit: bytes of vector memory; None is the compiler's default.
      interpret: run without a TPU.
    """
    batch, heads, tokens, dim = q.shape
    keys = k.shape[2]
    prefetched = [radius]
    inputs, weights = [q, k, v, center[:, :, None]], []
    if valid is not None:
        prefetched.append(_counts(valid, block_kv, compute))
        inputs.append(valid.astype(v.dtype)[:, None])
        weights = [pl.BlockSpec((1, 1, block_kv), lambda b, h, i, j, *_: (b, 0, j))]
    of_rows = pl.BlockSpec((1, 1, 1, block_q), lambda b, h, i, j, *_: (b, h, 0, i))
    of_queries = pl.BlockSpec((1, 1, block_q, dim), lambda b, h, i, j, *_: (b, h, i, 0))
    of_keys = pl.BlockSpec((1, 1, block_kv, dim), lambda b, h, i, j, *_: (b, h, j, 0))
    of_center = pl.BlockSpec((1, 1, 1, dim), lambda b, h, i, j, *_: (b, h, 0, 0))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, compute=compute, span=span, strip=strip, masked=valid is not None),
        name=f"flash_attention_{block_q}_{block_kv}",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, heads, pl.cdiv(tokens, block_q), keys // block_kv),
            in_specs=[of_queries, of_keys, of_keys, of_center, *weights],
            out_specs=[of_queries, of_rows],
            scratch_shapes=[
                pltpu.VMEM((dim + ONES, block_q), jnp.float32),
                pltpu.VMEM((1, block_q), jnp.float32),
                pltpu.VMEM((PIPELINE_DEPTH, compute, strip), jnp.float32),
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
    """Number of parts of each block up to the part of its last valid key."""
    some = valid.reshape(valid.shape[0], -1, block // compute, compute).any(-1)
    return jnp.max(some * jnp.arange(1, block // compute + 1), axis=-1).astype(jnp.int32)


def _kernel(*refs: Any, tokens: int, compute: int, span: int, strip: int, masked: bool) -> None:
    """Attention of one block of queries to one block of keys.

    refs: radius, [counts], q, k, v, center, [valid], out, lse, accumulators of outputs and sums, maxima (or bounds),
    logits in flight, bound_is_tight.
    """
    radius_ref, counts_ref, *arrays = refs if masked else (refs[0], None, *refs[1:])
    q_ref, k_ref, v_ref, center_ref, *valid_ref, out_ref, lse_ref, acc_ref, top_ref, inflight_ref, tight_ref = arrays
    example, head, block, step = (pl.program_id(axis) for axis in range(4))
    count = counts_ref[example, step] if masked else k_ref.shape[2] // compute

    @pl.when(step == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        rows = tokens - block * q_ref.shape[2]
        looseness = _bound(q_ref, center_ref, radius_ref[example, head], rows, top_ref)
        tight_ref[0] = (looseness < LOOSEST).astype(jnp.int32)

        @pl.when(~(looseness < LOOSEST))  # NaN in a query: its row alone is NaN with a running maximum
        def _() -> None:
            top_ref[...] = jnp.full_like(top_ref, LOWEST)

    bound_is_tight = tight_ref[0] == 1
    keys_ref = valid_ref[0] if masked else None
    tiles = _Tiles(q_ref, k_ref, v_ref, keys_ref, acc_ref, top_ref, inflight_ref, compute, strip)

    def add(parts: int, first: Any) -> None:
        pl.when(bound_is_tight)(lambda: tiles.add(first, parts, running=False))
        pl.when(~bound_is_tight)(lambda: tiles.add(first, parts, running=True))

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
        empty = total == 0  # not of a row with NaN; Mosaic's != is false for NaN
        safe = jnp.where(empty, 1.0, total)
        out_ref[0, 0] = (acc_ref[:dim] / safe).T.astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.where(empty, -jnp.inf, top_ref[...] + jnp.log2(safe))


def _bound(q_ref: Any, center_ref: Any, radius: jax.Array, rows: jax.Array, top_ref: Any) -> jax.Array:
    """Writes an upper bound of each row's logits; returns how much it exceeds the largest logit, at most, over `rows`.

    The largest logit of a row is at least the mean one, q center.
    """

    def strip_bound(number: jax.Array, loosest: jax.Array) -> jax.Array:
        first = pl.multiple_of(number * LANES, LANES)
        q = q_ref[0, 0, pl.ds(first, LANES), :].astype(jnp.float32)
        mean_logit, square = ((q * other).T.sum(axis=0, keepdims=True) for other in (center_ref[0, 0], q))
        slack = jnp.sqrt(square) * radius
        top_ref[:, pl.ds(first, LANES)] = mean_logit + slack
        real = first + jax.lax.broadcasted_iota(jnp.int32, slack.shape, 1) < rows
        return jnp.maximum(loosest, jnp.where(real, slack, 0.0))

    return jax.lax.fori_loop(0, q_ref.shape[2] // LANES, strip_bound, jnp.zeros((1, LANES), jnp.float32)).max()


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The matrix products of one block, in tiles of one part (`compute` keys) by one strip of queries.

    The compiler keeps the order of products, so the logits of a tile are computed `PIPELINE_DEPTH` tiles before their
    softmax: vector and matrix unit then work at the same time. `inflight` carries the logits of the next part's first
    tiles from one round to the next.
    """

    q: Any
    k: Any
    v: Any
    valid: Any
    acc: Any
    top: Any
    inflight: Any
    compute: int
    strip: int

    def begin(self) -> None:
        """Fills the pipeline with the logits of the first tiles."""
        for slot, tile in enumerate(self._of(0)[:PIPELINE_DEPTH]):
            self._put(slot, self._logits(*tile))

    def add(self, first: Any, parts: int, *, running: bool) -> None:
        """Accumulates the attention over some parts, unrolled, with a running maximum or the bound in its place."""
        tiles = [tile for part in range(parts) for tile in self._of(first + part)]
        last = self.k.shape[2] // self.compute - 1
        after = self._of(jnp.minimum(first + parts, last))[:PIPELINE_DEPTH]  # unused behind the last part
        inflight = [self.inflight[slot, :, : strip.stop - strip.start] for slot, (_, strip) in enumerate(after)]
        for (keys, strip), upcoming in zip(tiles, [*tiles, *after][len(after) :], strict=True):
            inflight.append(self._logits(*upcoming))
            s, top, acc = inflight.pop(0), self.top[:, strip], self.acc[:, strip]
            if running:
                higher = jnp.maximum(top, s.max(axis=0, keepdims=True))
                acc *= jnp.exp2(top - higher)
                self.top[:, strip] = top = higher
            weights = jnp.exp2(s - top).astype(self.v.dtype)
            self.acc[:, strip] = acc + self._product(self._values(keys), weights, ((1,), (0,)))
        for slot, s in enumerate(inflight):
            self._put(slot, s)

    def _of(self, part: Any) -> list[tuple[Any, slice]]:
        """The tiles of a part: (keys, strip of queries)."""
        keys = pl.ds(pl.multiple_of(part * self.compute, LANES), self.compute)
        size = self.q.shape[2]
        return [(keys, slice(start, min(start + self.strip, size))) for start in range(0, size, self.strip)]

    def _put(self, slot: int, s: jax.Array) -> None:
        self.inflight[slot, :, : s.shape[1]] = s

    def _values(self, keys: Any) -> jax.Array:
        """V^T, and below it `ONES` rows whose product with P is its sum over the valid keys."""
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
