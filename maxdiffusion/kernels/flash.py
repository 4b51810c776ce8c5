"""Forward flash attention for TPUs, transposed: queries lie along lanes, keys along sublanes.

With S^T = K Q^T and O^T = V^T P^T the second product contracts over keys, which fills a 256-wide matrix unit at a head
dim of 128 (P V would run at half rate): the ceiling is 2/3 of peak, not 1/2. The maximum and the sum of a row are then
taken over sublanes, one statistic per row. With a running maximum, which keeps the vector unit busy, and in parts with
masked keys the sum is a product of P with ones, next to V.

The online softmax is Milakov and Gimelshein's (arXiv 1805.02867), in blocks as by Dao et al. (arXiv 2205.14135). A
bound of each row's logits replaces its running maximum where it is tight enough.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

LANES = 128
SUBLANES = 8  # of a tile of fp32; a row's sum is that of so many partial sums
ROWS = 16  # of a tile of bf16: the first below V^T, of ones, gives the row sum
PIPELINE_DEPTH = 4  # tiles in flight between the two products, from one round of the loop to the next
AHEAD = 1  # more of them within a round, so that it ends with second products only
LARGEST = 3e38  # more than any finite key; comparisons with NaN are false
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
    valid: Bool[Array, "b padded_k"] | None = None,
    other: tuple[Float[Array, "b n s d"], Float[Array, "b n s"]] | None = None,
    *,
    dtype: DTypeLike | None = None,
    scale: float = 1.0,
    block_q: int,
    block_kv: int,
    compute: int,
    span: int,
    strip: int,
    vmem_limit: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b n s d"], Float[Array, "b n s"]]:
    """softmax(scale q k^T) v with exponentials to base 2, and the base-2 logarithm of its sum.

    q and k have one dtype, v's or a narrower one. Logits, maxima, sums and the second result are fp32. A row without a
    valid key gives 0 and -inf, a query with NaN makes its row NaN alone, a masked key none.
    No gradient.

    Args:
      q: queries; scaled and rounded once in vector memory.
      k: keys.
      v: values.
      center: fp32, of `bounding_ball`.
      radius: fp32, of `bounding_ball`. No logit of a query exceeds q center + |q| radius (Cauchy and Schwarz). If
        |q| radius is less than `LOOSEST` for all queries of a block, that bound takes the place of a running maximum,
        which saves the vector unit much of its work.
      valid: False leaves a key out; the parts of a block after its last valid key are skipped. Its length is a
        multiple of block_kv; k and v may be shorter.
      other: output and log-sum-exp for other keys, merged in at the end of each block of queries; a merge of its own
        would read and write fp32 outputs again.
      dtype: of the output; None: of v.
      scale: of the logits, log2(e) / sqrt(d) for the usual attention.
      block_q: queries per grid step, a multiple of 128, as d is. The last block may reach beyond s: queries are
        independent.
      block_kv: keys per grid step; divides k, or the length of `valid`.
      compute: keys per matrix product, a multiple of 128.
      span: keys per round of the unrolled loop, a multiple of compute; a rest, and what follows a masked key, takes
        rounds of `compute` keys.
      strip: queries per matrix product: the width of the matrix unit.
      vmem_limit: bytes of vector memory; None is the compiler's default.
      interpret: run without a TPU.
    """
    batch, heads, tokens, dim = q.shape
    keys = k.shape[2]
    prefetched = [radius]
    inputs, weights = [q, k, v, center[:, :, None]], []
    if valid is not None:
        prefetched += _counts(valid, block_kv, compute)
        inputs.append(valid.astype(v.dtype)[:, None])
        weights = [pl.BlockSpec((1, 1, block_kv), lambda b, h, i, j, *_: (b, 0, j))]
    of_rows = pl.BlockSpec((1, 1, 1, block_q), lambda b, h, i, j, *_: (b, h, 0, i))
    of_queries = pl.BlockSpec((1, 1, block_q, dim), lambda b, h, i, j, *_: (b, h, i, 0))
    of_keys = pl.BlockSpec((1, 1, block_kv, dim), lambda b, h, i, j, *_: (b, h, j, 0))
    of_center = pl.BlockSpec((1, 1, 1, dim), lambda b, h, i, j, *_: (b, h, 0, 0))
    if other is not None:
        inputs += [other[0], other[1][:, :, None]]
        weights += [of_queries, of_rows]
    out, lse = pl.pallas_call(
        functools.partial(
            _kernel, tokens=tokens, scale=scale, compute=compute, span=span, strip=strip, masked=valid is not None
        ),
        name=f"flash_attention_{block_q}_{block_kv}",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, heads, pl.cdiv(tokens, block_q), pl.cdiv(keys, block_kv)),
            in_specs=[of_queries, of_keys, of_keys, of_center, *weights],
            out_specs=[of_queries, of_rows],
            scratch_shapes=[
                pltpu.VMEM((1, 1, block_q, dim), q.dtype),
                pltpu.VMEM((dim, block_q), jnp.float32),
                pltpu.VMEM((SUBLANES, block_q), jnp.float32),
                pltpu.VMEM((1, block_q), jnp.float32),
                pltpu.VMEM((PIPELINE_DEPTH, compute, strip), jnp.float32),
                pltpu.VMEM((PIPELINE_DEPTH, compute, strip), v.dtype),
                pltpu.VMEM((PIPELINE_DEPTH, SUBLANES, strip), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, v.dtype if dtype is None else dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, tokens), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit
        ),
        interpret=interpret,
    )(*prefetched, *inputs)
    return out, lse[:, :, 0]


def bounding_ball(
    k: Float[Array, "b n k d"],
    valid: Bool[Array, "b padded_k"] | None = None,
    *,
    block: int,
    interpret: bool = False,
) -> tuple[Float[Array, "b n d"], Float[Array, "b n"]]:
    """Center, the mean, and radius of a ball that contains the valid keys of each head; fp32.

    Two passes over the keys. XLA's reductions over tokens and over lanes take 0.97 ms of a 14B layer on v6e; products
    with ones take a third. The radius is rounded up. A head without a valid key gives 0 and 0.

    Args:
      k: keys.
      valid: False leaves a key out. Its length is a multiple of `block`; k may be shorter.
      block: keys per grid step; divides k, or the length of `valid`.
      interpret: run without a TPU.
    """
    batch, heads, keys, dim = k.shape
    steps = pl.cdiv(keys, block)
    valid = jnp.ones((batch, steps * block), bool) if valid is None else valid
    count = jnp.maximum(valid.sum(axis=1), 1).astype(jnp.float32)
    of_head = pl.BlockSpec((1, 1, 1, dim), lambda b, h, phase, j, *_: (b, h, 0, 0))
    center, radius = pl.pallas_call(
        _ball_kernel,
        name=f"bounding_ball_{block}",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, 2, steps),
            in_specs=[
                pl.BlockSpec((1, 1, block, dim), lambda b, h, phase, j, *_: (b, h, j, 0)),
                pl.BlockSpec((1, 1, block), lambda b, h, phase, j, *_: (b, 0, j)),
            ],
            out_specs=[of_head, of_head],
            scratch_shapes=[pltpu.VMEM((SUBLANES, dim), jnp.float32), pltpu.VMEM((SUBLANES, block), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, heads, 1, dim), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
    )(count, k, valid.astype(jnp.float32)[:, None])
    return center[:, :, 0], radius[:, :, 0, 0]


def _ball_kernel(
    count_ref: Any, k_ref: Any, valid_ref: Any, center_ref: Any, radius_ref: Any, sum_ref: Any, square_ref: Any
) -> None:
    """One block of keys in the first pass, which sums them, or in the second, which takes the largest distance."""
    example, phase, step, last = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3) - 1
    k, valid = k_ref[0, 0], valid_ref[0]

    @pl.when((phase == 0) & (step == 0))
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        square_ref[...] = jnp.zeros_like(square_ref)

    @pl.when(phase == 0)
    def _() -> None:
        dtype = jnp.float32 if k.dtype == jnp.float32 else jnp.bfloat16
        finite = jnp.where(jnp.abs(k.astype(jnp.float32)) < LARGEST, k.astype(jnp.float32), 0.0).astype(dtype)
        rows = jnp.broadcast_to(valid, (SUBLANES, valid.shape[1])).astype(dtype)
        precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        sum_ref[...] += jnp.dot(rows, finite, precision=precision, preferred_element_type=jnp.float32)

    @pl.when((phase == 0) & (step == last))
    def _() -> None:
        center_ref[0, 0] = sum_ref[:1] / count_ref[example]

    @pl.when(phase == 1)
    def _() -> None:
        distance = k.astype(jnp.float32) - center_ref[0, 0]
        squares = (distance * distance).astype(jnp.bfloat16)
        ones = jnp.ones((ROWS, k.shape[1]), jnp.bfloat16)
        sums = jax.lax.dot_general(ones, squares, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        square_ref[...] = jnp.maximum(square_ref[...], jnp.where(valid > 0, sums[:SUBLANES], 0.0))

    @pl.when((phase == 1) & (step == last))
    def _() -> None:
        # bf16 rounds a square down by at most 2^-9 of it.
        radius_ref[0, 0] = jnp.full(radius_ref.shape[2:], jnp.sqrt(square_ref[...].max() * (1 + 2**-8)), jnp.float32)


def _counts(valid: Bool[Array, "b k"], block: int, compute: int) -> list[Int[Array, "b blocks"]]:
    """Of each block the number of parts before the first masked key, and up to the part of the last valid one."""
    parts = valid.reshape(valid.shape[0], -1, block // compute, compute)
    whole = jnp.cumprod(parts.all(-1), axis=-1).sum(-1)
    some = jnp.max(parts.any(-1) * jnp.arange(1, block // compute + 1), axis=-1)
    return [whole.astype(jnp.int32), some.astype(jnp.int32)]


def _kernel(*refs: Any, tokens: int, scale: float, compute: int, span: int, strip: int, masked: bool) -> None:
    """Attention of one block of queries to one block of keys.

    refs: radius, [whole and some parts], q, k, v, center, [valid], [another output and its lse], out, lse, scaled q,
    accumulators of outputs and sums, maxima (or bounds), logits, weights and sums in flight, bound_is_tight.
    """
    scalars, scratch = refs[: 3 if masked else 1], refs[-8:]
    *inputs, out_ref, lse_ref = refs[len(scalars) : -8]
    radius_ref, *counts_refs = scalars
    q_ref, k_ref, v_ref, center_ref, *optional = inputs
    valid_ref, other_refs = optional[: int(masked)], optional[int(masked) :]
    scaled_ref, acc_ref, sum_ref, top_ref, logits_ref, weights_ref, sums_ref, tight_ref = scratch
    example, head, block, step = (pl.program_id(axis) for axis in range(4))
    everything = k_ref.shape[2] // compute
    whole, count = (ref[example, step] for ref in counts_refs) if masked else (everything, everything)

    @pl.when(step == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        rows = tokens - block * q_ref.shape[2]
        looseness = _scale_and_bound(q_ref, scale, center_ref, radius_ref[example, head], rows, scaled_ref, top_ref)
        tight_ref[0] = (looseness < LOOSEST).astype(jnp.int32)

        @pl.when(~(looseness < LOOSEST))  # NaN in a query: its row alone is NaN with a running maximum
        def _() -> None:
            top_ref[...] = jnp.full_like(top_ref, LOWEST)

    bound_is_tight = tight_ref[0] == 1
    tiles = _Tiles(
        scaled_ref, k_ref, v_ref, acc_ref, sum_ref, top_ref, logits_ref, weights_ref, sums_ref, compute, strip
    )

    def both(run: Callable[[bool], None]) -> None:
        pl.when(bound_is_tight)(lambda: run(False))
        pl.when(~bound_is_tight)(lambda: run(True))

    @pl.when(count > 0)
    def _() -> None:
        parts = span // compute
        rounds = whole // parts
        both(lambda running: tiles.begin(running=running))

        def whole_round(number: Any, _: None) -> None:
            both(lambda running: tiles.add(number * parts, parts, running=running))

        def one_part(number: Any, _: None) -> None:
            both(lambda running: tiles.add(number, 1, running=running, valid=valid_ref[0] if masked else None))

        jax.lax.fori_loop(0, rounds, whole_round, None)
        if parts > 1 or masked:
            jax.lax.fori_loop(rounds * parts, count, one_part, None)

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        total = sum_ref[...].sum(axis=0, keepdims=True)
        empty = total == 0  # not of a row with NaN; Mosaic's != is false for NaN
        safe = jnp.where(empty, 1.0, total)
        out = acc_ref[...] / safe
        lse = jnp.where(empty, -jnp.inf, top_ref[...] + jnp.log2(safe))
        if other_refs:
            out, lse = _merged(out, lse, other_refs[0][0, 0].astype(jnp.float32).T, other_refs[1][0, 0])
        out_ref[0, 0] = out.T.astype(out_ref.dtype)
        lse_ref[0, 0] = lse


def _merged(
    out: Float[Array, "d s"], lse: Float[Array, "1 s"], other_out: Float[Array, "d s"], other_lse: Float[Array, "1 s"]
) -> tuple[Float[Array, "d s"], Float[Array, "1 s"]]:
    """`attention.merge.merge` with base-2 logarithms."""
    top = jnp.maximum(lse, other_lse)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    ours, theirs = jnp.exp2(lse - top), jnp.exp2(other_lse - top)
    total = ours + theirs
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    return out * (ours / safe) + other_out * (theirs / safe), jnp.where(empty, -jnp.inf, top + jnp.log2(safe))


def _scale_and_bound(
    q_ref: Any, scale: float, center_ref: Any, radius: jax.Array, rows: jax.Array, scaled_ref: Any, top_ref: Any
) -> jax.Array:
    """Writes the scaled queries and an upper bound of each row's logits.

    Returns how much it exceeds the largest logit, at most, over `rows`: that is at least the mean one, q center.
    """

    def strip_bound(number: jax.Array, loosest: jax.Array) -> jax.Array:
        first = pl.multiple_of(number * LANES, LANES)
        scaled = (q_ref[0, 0, pl.ds(first, LANES), :].astype(jnp.float32) * scale).astype(q_ref.dtype)
        scaled_ref[0, 0, pl.ds(first, LANES), :] = scaled
        q = scaled.astype(jnp.float32)
        mean_logit, square = ((q * other).T.sum(axis=0, keepdims=True) for other in (center_ref[0, 0], q))
        slack = jnp.sqrt(square) * radius
        top_ref[:, pl.ds(first, LANES)] = mean_logit + slack
        real = first + jax.lax.broadcasted_iota(jnp.int32, slack.shape, 1) < rows
        return jnp.maximum(loosest, jnp.where(real, slack, 0.0))

    return jax.lax.fori_loop(0, q_ref.shape[2] // LANES, strip_bound, jnp.zeros((1, LANES), jnp.float32)).max()


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The matrix products of one block, in tiles of one part (`compute` keys) by one strip of queries.

    The compiler keeps the order of products, so the first product of a tile is issued some tiles before its second:
    vector and matrix unit then work at the same time. What is between them, the logits or, with a bound, the weights
    and their sums, waits in scratch memory from one round to the next.
    """

    q: Any
    k: Any
    v: Any
    acc: Any
    sum: Any
    top: Any
    logits: Any
    weights: Any
    sums: Any
    compute: int
    strip: int

    def begin(self, *, running: bool) -> None:
        """Fills the pipeline with the first tiles."""
        for slot, tile in enumerate(self._of(0)[:PIPELINE_DEPTH]):
            self._put(slot, self._start(tile, running))

    def add(self, first: Any, parts: int, *, running: bool, valid: Any = None) -> None:
        """Accumulates the attention over some parts, unrolled, with a running maximum or the bound in its place."""
        of_parts = [self._of(first + part) for part in range(parts)]
        last = self.k.shape[2] // self.compute - 1
        after = self._of(jnp.minimum(first + parts, last))[:PIPELINE_DEPTH]  # unused behind the last part
        upcoming = iter([*itertools.chain(*of_parts), *after][len(after) :])
        inflight = [self._get(slot, strip, running) for slot, (_, strip) in enumerate(after)]
        inflight += [self._start(tile, running) for tile in itertools.islice(upcoming, AHEAD)]
        for tiles in of_parts:
            keys = tiles[0][0]
            row = None if valid is None else valid[0, :, keys].astype(jnp.float32)
            values = self._values(keys, running, row)
            mask = None if row is None else jnp.broadcast_to(row, (LANES, self.compute)).T
            for _, strip in tiles:
                inflight += [self._start(tile, running) for tile in itertools.islice(upcoming, 1)]
                self._end(strip, inflight.pop(0), values, mask)
        for slot, item in enumerate(inflight):
            self._put(slot, item)

    def _of(self, part: Any) -> list[tuple[Any, slice]]:
        """The tiles of a part: (keys, strip of queries)."""
        keys = pl.ds(pl.multiple_of(part * self.compute, LANES), self.compute)
        size = self.q.shape[2]
        return [(keys, slice(start, min(start + self.strip, size))) for start in range(0, size, self.strip)]

    def _values(self, keys: Any, running: bool, valid: jax.Array | None) -> jax.Array:
        """V^T, 0 at masked keys, and where the sum is a product a row of ones below it."""
        values = self.v[0, 0, keys, :].T
        if valid is not None:
            values = jnp.where(valid > 0, values.astype(jnp.float32), 0.0).astype(values.dtype)
        elif not running:
            return values
        row = jax.lax.broadcasted_iota(jnp.int32, (ROWS, self.compute), 0) == 0
        return jnp.concatenate([values, row.astype(values.dtype)])

    def _start(self, tile: tuple[Any, slice], running: bool) -> tuple[jax.Array, ...]:
        """The logits of a tile, or with a bound its weights and their partial sums."""
        keys, strip = tile
        logits = self._product(self.k[0, 0, keys, :], self.q[0, 0, strip, :], ((1,), (1,)))
        if running:
            return (logits,)
        weights = jnp.exp2(logits - self.top[:, strip])
        return weights.astype(self.v.dtype), weights.reshape(-1, SUBLANES, weights.shape[1]).sum(axis=0)

    def _end(self, strip: slice, item: tuple[jax.Array, ...], values: jax.Array, mask: jax.Array | None) -> None:
        """Adds a tile to the accumulators. mask: over lanes, 0 at masked keys."""
        acc, total, dim = self.acc[:, strip], self.sum[:, strip], self.acc.shape[0]
        lanes = strip.stop - strip.start
        valid = None if mask is None else jnp.concatenate([mask] * (lanes // LANES), axis=1) > 0
        if len(item) == 1:
            (logits,), top = item, self.top[:, strip]
            logits = logits if valid is None else jnp.where(valid, logits, LOWEST)
            higher = jnp.maximum(top, logits.max(axis=0, keepdims=True))
            lower = jnp.exp2(top - higher)
            acc, total = acc * lower, total * lower
            self.top[:, strip] = higher
            weights, sums = jnp.exp2(logits - higher), None
        else:
            weights, sums = item
        if valid is not None:
            weights = jnp.where(valid, weights.astype(jnp.float32), 0.0)
        out = self._product(values, weights.astype(self.v.dtype), ((1,), (0,)))
        self.acc[:, strip] = acc + out[:dim]
        self.sum[:, strip] = total + (sums if len(out) == dim else out[dim : dim + SUBLANES])

    def _get(self, slot: int, strip: slice, running: bool) -> tuple[jax.Array, ...]:
        refs = (self.logits,) if running else (self.weights, self.sums)
        return tuple(ref[slot, :, : strip.stop - strip.start] for ref in refs)

    def _put(self, slot: int, item: tuple[jax.Array, ...]) -> None:
        for ref, x in zip((self.logits,) if len(item) == 1 else (self.weights, self.sums), item, strict=True):
            ref[slot, :, : x.shape[1]] = x

    def _product(self, a: jax.Array, b: jax.Array, contracting: tuple[tuple[int], tuple[int]]) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return jax.lax.dot_general(
            a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
