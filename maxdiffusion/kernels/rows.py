"""Passes over the tokens of a transformer block for TPUs: a row is read once, computed in fp32 and written once.

XLA reads a row again for each reduction over it, and between (s, n d) and (n, s, d) copies one head at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num, Shaped

LANES = 128
BLOCK = 256  # rows of a grid step
STRIP = 64  # rows of a step of the loop; of 16, each takes 1.7 times as long, waiting for the sum over lanes


def layer_norm(
    x: Float[Array, "b s e"],
    gain: Float[Array, "_ t e"],
    bias: Float[Array, "_ t e"],
    second: Bool[Array, " s"] | None = None,
    *,
    eps: float,
    dtype: DTypeLike,
    largest: float | None = None,
    interpret: bool = False,
) -> Float[Array, "b s e"] | tuple[Num[Array, "b s e"], Float[Array, "b s 1"]]:
    """LayerNorm(x) * gain + bias; the variance is E[x^2] - E[x]^2.

    Args:
      x: rows; e is a multiple of 128.
      gain: fp32, one per example or one for all; t is 2 with `second`, else 1.
      bias: fp32, of the same shape.
      second: True on rows that take the second gain and bias.
      eps: added to the variance.
      dtype: of the result.
      largest: magnitude that each row is scaled to, such as 127; the fp32 scales are returned too. None: no scaling.
      interpret: run without a TPU.
    """
    of_vectors = pl.BlockSpec((None, *gain.shape[1:]), lambda b, i: (b if gain.shape[0] > 1 else 0, 0, 0))
    inputs, specs = [x, gain, bias], [_features(x), of_vectors, of_vectors]
    if second is not None:
        inputs.append(second.astype(jnp.float32)[:, None])
        specs.append(pl.BlockSpec((BLOCK, 1), lambda b, i: (i, 0)))
    return _call(_layer_norm, "layer_norm", inputs, specs, x.shape, dtype, largest, interpret, eps=eps)


def _layer_norm(x_ref: Any, gain_ref: Any, bias_ref: Any, *refs: Any, write: Callable[..., None], eps: float) -> None:
    features = x_ref.shape[-1]

    def strip(rows: Any) -> None:
        total = square = jnp.zeros((STRIP, LANES), jnp.float32)
        for part in _parts(features):
            x = x_ref[rows, part].astype(jnp.float32)
            total, square = total + x, square + x * x
        mean, square = (jnp.sum(each, axis=-1, keepdims=True) / features for each in (total, square))
        factor = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + eps)
        second = jnp.broadcast_to(refs[0][rows], (STRIP, LANES)) > 0 if refs else None

        def vector(ref: Any, part: slice) -> jax.Array:
            return ref[:1, part] if second is None else jnp.where(second, ref[1:2, part], ref[:1, part])

        def value(part: slice) -> jax.Array:
            x = x_ref[rows, part].astype(jnp.float32)
            return (x - mean) * factor * vector(gain_ref, part) + vector(bias_ref, part)

        write(rows, _parts(features), value)

    _strips(strip)


def split_heads(
    x: Float[Array, "b s e"],
    heads: int,
    gain: Float[Array, " e"] | None = None,
    rotary: tuple[Float[Array, "s d"], Float[Array, "s d"]] | None = None,
    factor: Float[Array, "b s 1"] | None = None,
    *,
    eps: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "b {heads} s d"]:
    """RMSNorm over all heads, rotation, and the heads before the tokens.

    Args:
      x: the heads' features side by side; d is a multiple of 128.
      heads: their number.
      gain: fp32, of the norm; None: no norm.
      rotary: fp32 tables of `rope.rotate`; None: no rotation.
      factor: fp32, of the norm, for rows that are parts of longer ones; None: that of the rows.
      eps: of the norm.
      interpret: run without a TPU.
    """
    batch, tokens, features = x.shape
    dim = features // heads
    inputs, specs = [x], [_features(x)]
    if gain is not None:
        swapped = jnp.flip(gain.reshape(-1, 2), axis=-1).reshape(-1)
        inputs.append(jnp.stack([gain, swapped]))
        specs.append(pl.BlockSpec((2, features), lambda b, i: (0, 0)))
        if factor is not None:
            inputs.append(factor)
            specs.append(pl.BlockSpec((None, BLOCK, 1), lambda b, i: (b, i, 0)))
    if rotary is not None:
        inputs += rotary
        specs += [pl.BlockSpec((BLOCK, dim), lambda b, i: (i, 0))] * 2
    return pl.pallas_call(
        functools.partial(
            _split_heads, normed=gain is not None, given=factor is not None, rotated=rotary is not None, eps=eps
        ),
        name=f"rows_{'rotate' if rotary is not None else 'rms_norm' if gain is not None else 'split'}",
        grid=(batch, pl.cdiv(tokens, BLOCK)),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, heads, BLOCK, dim), lambda b, i: (b, 0, i, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, tokens, dim), x.dtype),
        compiler_params=_PARALLEL,
        interpret=interpret,
    )(*inputs)


def _split_heads(x_ref: Any, *refs: Any, normed: bool, given: bool, rotated: bool, eps: float) -> None:
    out_ref = refs[-1]
    heads, _, dim = out_ref.shape

    def strip(rows: Any) -> None:
        factor = None
        if given:
            factor = refs[1][rows]
        elif normed:
            square = jnp.zeros((STRIP, dim), jnp.float32)
            for part in _parts(heads * dim, dim):
                square += jnp.square(x_ref[rows, part].astype(jnp.float32))
            factor = jax.lax.rsqrt(jnp.sum(square, axis=-1, keepdims=True) / (heads * dim) + eps)
        tables = [ref[rows] for ref in refs[-3:-1]] if rotated else []

        def scaled(x: jax.Array, gain: int, part: slice) -> jax.Array:
            x = x.astype(jnp.float32)
            return x if factor is None else x * factor * refs[0][gain : gain + 1, part]

        for head, part in enumerate(_parts(heads * dim, dim)):
            x = x_ref[rows, part]
            out = scaled(x, 0, part) if normed or rotated else x
            if rotated:
                cos, sin = tables
                out = out * cos + scaled(_swapped(x), 1, part) * sin
            out_ref[head, rows] = out.astype(out_ref.dtype)

    _strips(strip)


def _swapped(x: jax.Array) -> jax.Array:
    """The lanes of each pair swapped; of 16 bits, two rows in a register."""
    words = x if x.dtype.itemsize == 4 else pltpu.bitcast(x, jnp.int32)
    even = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1) % 2 == 0
    swapped = jnp.where(even, pltpu.roll(words, x.shape[1] - 1, 1), pltpu.roll(words, 1, 1))
    return swapped if x.dtype.itemsize == 4 else pltpu.bitcast(swapped, x.dtype)


def gelu(
    x: Float[Array, "b s e"], *, dtype: DTypeLike, largest: float, interpret: bool = False
) -> tuple[Num[Array, "b s e"], Float[Array, "b s 1"]]:
    """GELU by its tanh approximation, in 8 bits; dtype and `largest` as of `layer_norm`."""
    return _call(_gelu, "gelu", [x], [_features(x)], x.shape, dtype, largest, interpret)


def _gelu(x_ref: Any, *, write: Callable[..., None]) -> None:
    def strip(rows: Any) -> None:
        def value(part: slice) -> jax.Array:
            return jax.nn.gelu(x_ref[rows, part].astype(jnp.float32), approximate=True)

        write(rows, _parts(x_ref.shape[-1]), value)

    _strips(strip)


def join_heads(
    x: Float[Array, "b n s d"], *, dtype: DTypeLike, largest: float | None = None, interpret: bool = False
) -> Float[Array, "b s e"] | tuple[Num[Array, "b s e"], Float[Array, "b s 1"]]:
    """The features of all heads side by side; dtype and `largest` as of `layer_norm`."""
    batch, heads, tokens, dim = x.shape
    specs = [pl.BlockSpec((None, heads, BLOCK, dim), lambda b, i: (b, 0, i, 0))]
    return _call(_join_heads, "join", [x], specs, (batch, tokens, heads * dim), dtype, largest, interpret)


def _join_heads(x_ref: Any, *, write: Callable[..., None]) -> None:
    heads, _, dim = x_ref.shape

    def strip(rows: Any) -> None:
        write(rows, _parts(heads * dim, dim), lambda part: x_ref[part.start // dim, rows])

    _strips(strip)


def swap_leading(x: Shaped[Array, "m n s d"], *, interpret: bool = False) -> Shaped[Array, "n m s d"]:
    """Swaps the first two axes; s is a multiple of 16, d of 128."""
    m, n, tokens, dim = x.shape
    block = min(tokens, 16 * BLOCK)

    def body(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...]

    return pl.pallas_call(
        body,
        name="rows_swap",
        grid=(m, n, pl.cdiv(tokens, block)),
        in_specs=[pl.BlockSpec((None, None, block, dim), lambda i, j, k: (i, j, k, 0))],
        out_specs=pl.BlockSpec((None, None, block, dim), lambda i, j, k: (j, i, k, 0)),
        out_shape=jax.ShapeDtypeStruct((n, m, tokens, dim), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
    )(x)


# ---- what they share

VMEM_LIMIT = 48 << 20  # bytes; 14,336 features of fp32 in 8 bits take 40 MB
_PARALLEL = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT)


def _features(x: Shaped[Array, "b s e"]) -> pl.BlockSpec:
    return pl.BlockSpec((None, BLOCK, x.shape[2]), lambda b, i: (b, i, 0))


def _parts(features: int, size: int = LANES) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, features, size))


def _strips(strip: Callable[[Any], None]) -> None:
    """Calls `strip` with each slice of a block's rows."""

    def step(number: Any, _: None) -> None:
        strip(pl.ds(pl.multiple_of(number * STRIP, STRIP), STRIP))

    jax.lax.fori_loop(0, BLOCK // STRIP, step, None)


def _call(
    kernel: Callable[..., None],
    name: str,
    inputs: list[jax.Array],
    specs: list[pl.BlockSpec],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    largest: float | None,
    interpret: bool,
    **options: Any,
) -> Any:
    """Calls a kernel with rows of features as its result, and `write`, by which it gives a strip of them."""
    batch, tokens, features = shape
    out = jax.ShapeDtypeStruct(shape, dtype)
    arrays = out if largest is None else (out, jax.ShapeDtypeStruct((batch, tokens, 1), jnp.float32))
    of_result = jax.tree.map(lambda array: pl.BlockSpec((None, BLOCK, array.shape[2]), lambda b, i: (b, i, 0)), arrays)

    def body(*refs: Any) -> None:
        given, results = refs[: len(inputs)], refs[len(inputs) :]

        def write(rows: Any, parts: Iterator[slice], value: Callable[[slice], jax.Array]) -> None:
            if largest is None:
                for part in parts:
                    results[0][rows, part] = value(part).astype(dtype)
            else:
                _write_scaled(rows, list(parts), value, results, largest)

        kernel(*given, write=write, **options)

    return pl.pallas_call(
        body,
        name=f"rows_{name}" if largest is None else f"rows_{name}_scaled",
        grid=(batch, pl.cdiv(tokens, BLOCK)),
        in_specs=specs,
        out_specs=of_result,
        out_shape=arrays,
        scratch_shapes=[] if largest is None else [pltpu.VMEM((STRIP, features), jnp.float32)],
        compiler_params=_PARALLEL,
        interpret=interpret,
    )(*inputs)


def _write_scaled(
    rows: Any,
    parts: list[slice],
    value: Callable[[slice], jax.Array],
    refs: tuple[Any, ...],
    largest: float,
) -> None:
    """The rows in 8 bits, by the formula of `models.quantized.quantize`."""
    out_ref, scale_ref, kept_ref = refs
    magnitude = total = jnp.zeros((STRIP, parts[0].stop), jnp.float32)
    for part in parts:
        x = value(part).astype(jnp.float32)
        kept_ref[:, part] = x
        magnitude, total = jnp.maximum(magnitude, jnp.abs(x)), total + jnp.abs(x)
    # The sum has the NaN or infinity of a row, which a maximum may lose.
    total = jnp.sum(total, axis=-1, keepdims=True)
    scale = jnp.where(jnp.isfinite(total), jnp.max(magnitude, axis=-1, keepdims=True) / largest, total)
    scale = jnp.where(scale == 0, 1.0, scale)
    scale_ref[rows] = scale
    for part in parts:
        x = jnp.clip(kept_ref[:, part] / scale, -largest, largest)
        out_ref[rows, part] = (jnp.round(x) if jnp.issubdtype(out_ref.dtype, jnp.integer) else x).astype(out_ref.dtype)
