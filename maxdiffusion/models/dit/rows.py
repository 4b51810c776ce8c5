"""What a block computes of each token between its products; on TPUs one kernel each (docs/tpu_layouts.md)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from maxdiffusion.hardware.quantization import LARGEST
from maxdiffusion.kernels import rows
from maxdiffusion.models import layers
from maxdiffusion.models.dit.rope import rotate
from maxdiffusion.models.layers import RMSNorm
from maxdiffusion.models.quantized import Quantized, operand
from maxdiffusion.parallel import axes, degree, per_device, platform

Rotary = tuple[Float[Array, "s d"], Float[Array, "s d"]]  # tables of `rope.rotate`


def layer_norm(
    x: Float[Array, "b s e"],
    gain: Float[Array, "_ t e"],
    bias: Float[Array, "_ t e"],
    clean: Bool[Array, " s"] | None,
    eps: float,
    dtype: DTypeLike,
) -> Float[Array, "b s e"] | Quantized:
    """LayerNorm(x) * gain + bias in fp32, as the operand of a product in `dtype`.

    Gain and bias are fp32, of each example or of all; t is 2 with `clean`, where the second is that of its tokens.
    """
    if not _by_kernel(x.shape[-1]):
        gain, bias = (v if clean is None else jnp.where(clean[:, None], v[:, 1:], v[:, :1]) for v in (gain, bias))
        return operand(layers.layer_norm(x, eps) * gain + bias, dtype)

    def own(*arrays: Any) -> Any:
        return rows.layer_norm(*arrays, eps=eps, dtype=dtype, largest=_largest(dtype), interpret=_interpret())

    of_vectors = (axes.BATCH, None, None)
    names = [(axes.BATCH, axes.SEQUENCE, None), of_vectors, of_vectors, (axes.SEQUENCE,)]
    return _operand(per_device(own, [x, gain, bias, clean], names, names[0]))


def split_heads(
    x: Float[Array, "b s e"],
    heads: int,
    norm: RMSNorm | None = None,
    rotary: Rotary | None = None,
    tokens: str | None = axes.SEQUENCE,
) -> Float[Array, "b s {heads} d"]:
    """RMSNorm over all heads and rotation, both optional and in fp32; the result has the dtype of `x`.

    `tokens` is the logical axis of the tokens.
    """
    if not _by_kernel(x.shape[-1] // heads):
        out = x.reshape(*x.shape[:2], heads, -1)
        if norm is not None:
            out = out.astype(jnp.float32) * norm.factor(x)[..., None] * norm.scale[...].reshape(out.shape[2:])
        return (out if rotary is None else rotate(out, *rotary)).astype(x.dtype)

    shards = degree(axes.HEADS)
    eps = 0.0 if norm is None else norm.eps
    gain = None if norm is None else norm.scale[...]
    factor = None if norm is None or shards == 1 else norm.factor(x)

    def own(*arrays: Any) -> Any:
        x, *rest = arrays
        return rows.split_heads(x, heads // shards, *rest, eps=eps, interpret=_interpret()).swapaxes(1, 2)

    names = [(axes.BATCH, tokens, axes.HEADS), (axes.HEADS,), (tokens, None), (axes.BATCH, tokens, None)]
    return per_device(own, [x, gain, rotary, factor], names, (axes.BATCH, tokens, axes.HEADS, None))


def join_heads(x: Float[Array, "b s n d"], dtype: DTypeLike) -> Float[Array, "b s e"] | Quantized:
    """The features of all heads side by side, as the operand of a product in `dtype`."""
    if not _by_kernel(x.shape[-1]):
        return operand(x.reshape(*x.shape[:2], -1), dtype)
    whole = degree(axes.HEADS) == 1  # 8 bits have a scale for each token, of all its features

    def own(x: jax.Array) -> Any:
        out = dtype if whole else x.dtype
        return rows.join_heads(x.swapaxes(1, 2), dtype=out, largest=_largest(out), interpret=_interpret())

    names = [(axes.BATCH, axes.SEQUENCE, axes.HEADS, None)]
    joined = _operand(per_device(own, [x], names, (axes.BATCH, axes.SEQUENCE, axes.HEADS)))
    return joined if whole else operand(joined, dtype)


def gelu(x: Float[Array, "b s e"], dtype: DTypeLike) -> Float[Array, "b s e"] | Quantized:
    """GELU by its tanh approximation in fp32, as the operand of a product in `dtype`."""
    largest = _largest(dtype)
    if largest is None or degree(axes.MLP) > 1 or not _by_kernel(x.shape[-1]):
        return layers.activated(layers.gelu_tanh, x, dtype)

    def own(x: jax.Array) -> Any:
        return rows.gelu(x, dtype=dtype, largest=largest, interpret=_interpret())

    names = (axes.BATCH, axes.SEQUENCE, None)
    return _operand(per_device(own, [x], [names], names))


def _by_kernel(features: int) -> bool:
    return platform() == "tpu" and features % rows.LANES == 0


def _interpret() -> bool:
    return platform() != "tpu"


def _largest(dtype: DTypeLike) -> float | None:
    return LARGEST.get(jnp.dtype(dtype).name)


def _operand(result: Any) -> Any:
    return Quantized(*result) if isinstance(result, tuple) else result
