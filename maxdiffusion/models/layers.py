"""Layers that the networks share.

Policy: a matmul casts its inputs to the activation dtype, accumulates and adds its bias in fp32, and returns the
activation dtype; norms take anything and compute and return fp32, so that modulation stays in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from maxdiffusion.hardware.quantization import Quantization
from maxdiffusion.models.quantized import Quantized, operand, product
from maxdiffusion.parallel import axes, gathered

Axes = tuple[str | None, ...]
M = TypeVar("M", bound=nnx.Module)


def parameter(shape: tuple[int, ...], dtype: DTypeLike, *logical: str | None) -> nnx.Param:
    """An abstract parameter: networks are built of shapes, and the loader fills them from a checkpoint.

    `logical` names the axis of each dimension, None for a replicated one; without names all are replicated.
    """
    abstract = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    return nnx.Param(abstract, out_sharding=logical or (None,) * len(shape), eager_sharding=False)


class Dtypes(NamedTuple):
    """The dtypes of a network's matmuls."""

    weights: DTypeLike = jnp.float32  # as stored on the devices
    activations: DTypeLike = jnp.float32  # of inputs and output
    quantization: Quantization | None = None  # of the kernels in transformer blocks; None: none

    @property
    def unquantized(self) -> Dtypes:
        """Those of the layers outside of the blocks."""
        return self._replace(quantization=None)


class Linear(nnx.Module):
    """x @ kernel + bias over the last axis; kernel (in, out).

    A quantised kernel has 8 bits and an fp32 scale for each output channel, `kernel_scale`.
    """

    def __init__(self, in_features: int, out_features: int, logical: Axes, dtypes: Dtypes, use_bias: bool = True):
        self.dtype = dtypes.activations
        self.logical = logical
        self.quantization = dtypes.quantization
        stored = dtypes.weights if self.quantization is None else self.quantization.dtype
        self.kernel = parameter((in_features, out_features), stored, *logical)
        # Vectors over the model dim are replicated: gathering them would cost more latency than they take memory.
        bias_axis = None if logical[1] == axes.EMBED else logical[1]
        self.kernel_scale = parameter((out_features,), jnp.float32, bias_axis) if self.quantization else None
        self.bias = parameter((out_features,), dtypes.weights, bias_axis) if use_bias else None

    @property
    def operand_dtype(self) -> DTypeLike:
        """Dtype that `x` is rounded to before the product."""
        if self.quantization is not None and self.quantization.products:
            return self.quantization.dtype
        return self.dtype

    def gathered(self) -> Num[Array, "in out"]:
        """The kernel, gathered from the devices that it is spread over.

        In the narrower of both dtypes, so that no device receives more bytes than it computes with.
        """
        narrower = min(self.kernel.dtype, jnp.dtype(self.dtype), key=lambda dtype: dtype.itemsize)
        return gathered(self.kernel[...].astype(narrower), *self.logical)

    def __call__(
        self, x: Float[Array, "... in"] | Quantized, kernel: Num[Array, "in out"] | None = None
    ) -> Float[Array, "... out"]:
        """`kernel` is that of `gathered`, if it has been called already."""
        kernel = self.gathered() if kernel is None else kernel
        x = x if isinstance(x, Quantized) else operand(x, self.operand_dtype)
        if isinstance(x, Quantized):
            y = product(x, kernel)
        else:
            y = jnp.matmul(x, kernel.astype(self.dtype), preferred_element_type=jnp.float32)
        if self.kernel_scale is not None:
            y = y * self.kernel_scale[...]
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(self.dtype)


class MLP(nnx.Module):
    """Linear, activation in fp32, linear."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        activation: Callable[[jax.Array], jax.Array],
        dtypes: Dtypes,
    ):
        self.activation = activation
        self.linear_1 = Linear(in_features, hidden_features, (axes.EMBED, axes.MLP), dtypes)
        self.linear_2 = Linear(hidden_features, out_features, (axes.MLP, axes.EMBED), dtypes)

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        return self.linear_2(activated(self.activation, self.linear_1(x), self.linear_2.operand_dtype))


def activated(
    activation: Callable[[jax.Array], jax.Array], x: Float[Array, "... e"], dtype: DTypeLike
) -> Float[Array, "... e"] | Quantized:
    """The activation in fp32, as the operand of a product in `dtype`.

    Without the barrier XLA recomputes it for every tile of the next product: docs/tpu_layouts.md.
    """
    return jax.lax.optimization_barrier(operand(activation(x.astype(jnp.float32)), dtype))


def gelu_tanh(x: Float[Array, " ..."]) -> Float[Array, " ..."]:
    """GELU by its tanh approximation (torch `gelu(approximate="tanh")`, transformers `gelu_new`)."""
    return jax.nn.gelu(x, approximate=True)


def layer_norm(x: Float[Array, "... e"], eps: float) -> Float[Array, "... e"]:
    """LayerNorm without gain and bias; fp32 out.

    The variance is E[x^2] - E[x]^2, both sums of one pass over x: docs/tpu_layouts.md.
    """
    x = x.astype(jnp.float32)
    mean, square = (jnp.mean(y, axis=-1, keepdims=True) for y in (x, jnp.square(x)))
    return (x - mean) * jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + eps)


class LayerNorm(nnx.Module):
    """LayerNorm with gain and bias, both fp32; fp32 out."""

    def __init__(self, features: int, eps: float):
        self.eps = eps
        self.scale = parameter((features,), jnp.float32)
        self.bias = parameter((features,), jnp.float32)

    def __call__(self, x: Float[Array, "... e"]) -> Float[Array, "... e"]:
        return layer_norm(x, self.eps) * self.scale[...] + self.bias[...]


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale (Zhang and Sennrich, 2019); the gain is fp32; fp32 out."""

    def __init__(self, features: int, eps: float):
        self.eps = eps
        self.scale = parameter((features,), jnp.float32)

    def __call__(self, x: Float[Array, "... e"]) -> Float[Array, "... e"]:
        return x.astype(jnp.float32) * self.factor(x) * self.scale[...]

    def factor(self, x: Float[Array, "... e"]) -> Float[Array, "... 1"]:
        """1 / sqrt(mean(x^2) + eps)."""
        return jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + self.eps)


def stack(make: Callable[[], M], layers: int) -> M:
    """A module whose parameters have a leading axis of `layers`, named `axes.LAYERS`."""
    graph, state = nnx.split(make())

    def stacked(one: nnx.Param) -> nnx.Param:
        return parameter((layers, *one.shape), one.dtype, axes.LAYERS, *one.get_metadata("out_sharding"))

    return nnx.merge(graph, jax.tree.map(stacked, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Param)))


def scan(
    blocks: M, step: Callable[[M, Any, Any], tuple[Any, Any]], carry: Any, xs: Any, unroll: bool
) -> tuple[Any, Any]:
    """Scans `carry, y = step(block, carry, x)` over the stacked `blocks`; `xs` and `ys` have a leading layer axis.

    One block is compiled and looped over; with `unroll` the program has a copy for every layer.
    """
    graphdef, params = nnx.split(blocks)

    def body(carry: Any, slices: tuple[Any, Any]) -> tuple[Any, Any]:
        params, x = slices
        return step(nnx.merge(graphdef, params), carry, x)

    return jax.lax.scan(body, carry, (params, xs), unroll=unroll)


def pick(blocks: M, layer: Int[Array, ""]) -> M:
    """The block at index `layer` of the stacked `blocks`."""
    graphdef, params = nnx.split(blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), params))
