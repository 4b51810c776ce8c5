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
STRIP = 256  # queries that one product takes: the width of the matrix unit
ONES = 16  # rows of ones beside V^T, whose product with P is the sum: a tile of bf16
AHEAD = 5  # tiles of logits that are under way while one is exponentiated
TILES = 96  # at most so many are unrolled: the matrix unit idles for 290 cycles between two rounds of the loop
LOWEST = -1e30  # added to the logits of keys that do not count; finite, so that differences of two are no NaN


def flash_attention(
    q: Float[Array, "b n s d"],
    k: Float[Array, "b n k d"],
    v: Float[Array, "b n d k"],
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
    span = compute * _unrolled(block_kv // compute, -(-block_q // STRIP))
    prefetched = [sound.astype(jnp.int32)]
    inputs, weights = [q, k, v, bound[:, :, None]], []
    if valid is not None:
        prefetched.append(_counts(valid, block_kv, span))
        inputs.append(valid.astype(v.dtype)[:, None])
        weights = [pl.BlockSpec((1, 1, block_kv), lambda b, h, i, j, *_: (b, 0, j))]
    of_rows = pl.BlockSpec((1, 1, 1, block_q), lambda b, h, i, j, *_: (b, h, 0, i))
    of_queries = pl.BlockSpec((1, 1, block_q, dim), lambda b, h, i, j, *_: (b, h, i, 0))
    of_keys = pl.BlockSpec((1, 1, block_kv, dim), lambda b, h, i, j, *_: (b, h, j, 0))
    of_values = pl.BlockSpec((1, 1, dim, block_kv), lambda b, h, i, j, *_: (b, h, 0, j))
    out, lse = pl.pallas_call(
        functools.partial(_kernel, compute=compute, span=span, masked=valid is not None),
        name="flash_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, heads, tokens // block_q, keys // block_kv),
            in_specs=[of_queries, of_keys, of_values, of_rows, *weights],
            out_specs=[of_queries, of_rows],
            scratch_shapes=[
                pltpu.VMEM((dim + ONES, block_q), jnp.float32),
                pltpu.VMEM((1, block_q), jnp.float32),
                pltpu.VMEM((AHEAD, compute, STRIP), jnp.float32),
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


def _unrolled(parts: int, strips: int) -> int:
    """How many of the parts a round of the loop takes."""
    return max(n for n in range(1, parts + 1) if parts % n == 0 and (n == 1 or n * strips <= TILES))


def _counts(valid: Bool[Array, "b k"], block: int, span: int) -> Int[Array, "b blocks"]:
    """How many spans of each block there are up to its last key that counts."""
    some = valid.reshape(valid.shape[0], -1, block // span, span).any(-1)
    return jnp.max(some * jnp.arange(1, block // span + 1), axis=-1).astype(jnp.int32)


def _kernel(*refs: Any, compute: int, span: int, masked: bool) -> None:
    """One block of queries with one of keys.

    refs: sound, [counts], q, k, v, bound, [valid], out, lse, sums of outputs, maxima, logits under way.
    """
    sound_ref, counts_ref, *arrays = refs if masked else (refs[0], None, *refs[1:])
    q_ref, k_ref, v_ref, bound_ref, *valid_ref, out_ref, lse_ref, acc_ref, top_ref, waiting_ref = arrays
    example, head, step = pl.program_id(0), pl.program_id(1), pl.program_id(3)
    sound = sound_ref[example, head] == 1
    count = counts_ref[example, step] if masked else k_ref.shape[2] // span

    @pl.when(step == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        top_ref[...] = jnp.where(sound, bound_ref[0, 0], LOWEST)

    tiles = _Tiles(q_ref, k_ref, v_ref, *(valid_ref or [None]), acc_ref, top_ref, waiting_ref, compute, span)

    def add(number: Any, _: None) -> None:
        pl.when(sound)(lambda: tiles.add(number, running=False))
        pl.when(~sound)(lambda: tiles.add(number, running=True))

    @pl.when(count > 0)
    def _() -> None:
        tiles.begin()
        jax.lax.fori_loop(0, count, add, None)

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        dim = v_ref.shape[2]
        total = acc_ref[dim : dim + 1]
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        out_ref[0, 0] = (acc_ref[:dim] / safe).T.astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.where(some, top_ref[...] + jnp.log2(safe), -jnp.inf)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The products of one block: tiles of `compute` keys by a strip of queries, unrolled over a span of keys.

    The compiler keeps the order of products, so the logits of a tile are written `AHEAD` tiles before their softmax:
    the vector unit then works beside the matrix unit. Those of the next span's first tiles wait in `ahead`.
    """

    q: Any
    k: Any
    v: Any
    valid: Any
    acc: Any
    top: Any
    waiting: Any
    compute: int
    span: int

    @property
    def strips(self) -> list[slice]:
        size = self.q.shape[2]
        return [slice(s, min(s + STRIP, size)) for s in range(0, size, STRIP)]

    def begin(self) -> None:
        """The logits of the first tiles."""
        for slot, (start, strip) in enumerate(self._first(0)):
            self.waiting[slot, :, : strip.stop - strip.start] = self._logits(start, strip)

    def add(self, number: Any, *, running: bool) -> None:
        """Adds the attention over a span to the accumulators; the maximum is a running one or stays."""
        last = self.k.shape[2] // self.span - 1
        ahead = [*self._within(number * self.span), *self._first(jnp.minimum(number + 1, last) * self.span)]
        tiles = self._within(number * self.span)
        under_way = [
            self.waiting[slot, :, : strip.stop - strip.start] for slot, (_, strip) in enumerate(self._first(0))
        ]
        coming = ahead[len(under_way) :]
        for (start, strip), next_tile in zip(tiles, coming, strict=True):
            under_way.append(self._logits(*next_tile))
            s = under_way.pop(0)
            top = self.top[:, strip]
            acc = self.acc[:, strip]
            if running:
                higher = jnp.maximum(top, s.max(axis=0, keepdims=True))
                acc *= jnp.exp2(top - higher)
                self.top[:, strip] = top = higher
            weights = jnp.exp2(s - top).astype(self.v.dtype)
            self.acc[:, strip] = acc + self._product(self._values(start), weights, ((1,), (0,)))
        for slot, s in enumerate(under_way):
            self.waiting[slot, :, : s.shape[1]] = s

    def _within(self, start: Any) -> list[tuple[Any, slice]]:
        """(first key, strip of queries) of the tiles of the span that starts there."""
        starts = [pl.multiple_of(start + part, LANES) for part in range(0, self.span, self.compute)]
        return [(at, strip) for at in starts for strip in self.strips]

    def _first(self, start: Any) -> list[tuple[Any, slice]]:
        return self._within(start)[:AHEAD]

    def _values(self, start: Any) -> jax.Array:
        """V^T, and below it rows whose product with P is its sum over the keys that count."""
        keys, shape = pl.ds(start, self.compute), (ONES, self.compute)
        ones = jnp.ones(shape, self.v.dtype) if self.valid is None else jnp.broadcast_to(self.valid[0, :, keys], shape)
        return jnp.concatenate([self.v[0, 0, :, keys], ones])

    def _logits(self, start: Any, strip: slice) -> jax.Array:
        return self._product(self.k[0, 0, pl.ds(start, self.compute), :], self.q[0, 0, strip, :], ((1,), (1,)))

    def _product(self, a: jax.Array, b: jax.Array, contracting: tuple[tuple[int], tuple[int]]) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if self.q.dtype == jnp.float32 else None
        return jax.lax.dot_general(
            a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32
        )
