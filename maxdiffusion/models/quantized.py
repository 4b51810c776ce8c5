"""Products in 8 bits: symmetric, weights scaled per output channel and activations per token."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from maxdiffusion.hardware.quantization import LARGEST


class Quantized(NamedTuple):
    """Activations in 8 bits: `values` x `scale`."""

    values: Num[Array, "... e"]
    scale: Float[Array, "... 1"]  # fp32


def quantize(x: Float[Array, "... e"], dtype: DTypeLike) -> Quantized:
    """`x` scaled so that the largest magnitude of each token is the dtype's, rounded to nearest even.

    A barrier keeps XLA from repeating the pass in each of several products that read the result.
    """
    largest = LARGEST[jnp.dtype(dtype).name]
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / largest
    scale = jnp.where(scale == 0, 1.0, scale)  # NaN and infinity stay in it, as integers have none
    values = jnp.clip(x / scale, -largest, largest)
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.round(values)
    return Quantized(*jax.lax.optimization_barrier((values.astype(dtype), scale)))


def operand(x: Float[Array, "... e"], dtype: DTypeLike) -> Float[Array, "... e"] | Quantized:
    """`x` as the operand of a product in `dtype`: rounded, or quantised to 8 bits."""
    return quantize(x, dtype) if jnp.dtype(dtype).name in LARGEST else x.astype(dtype)


def product(x: Quantized, kernel: Num[Array, "in out"]) -> Float[Array, "... out"]:
    """The product with a kernel in 8 bits, times the scales of `x`; int8 accumulates in int32, fp8 in fp32. fp32."""
    wide = jnp.int32 if jnp.issubdtype(kernel.dtype, jnp.integer) else jnp.float32
    contracted = ((x.values.ndim - 1,), (0,)), ((), ())
    y = jax.lax.dot_general(x.values, kernel, contracted, preferred_element_type=wide)
    return y.astype(jnp.float32) * x.scale


_DEFINED = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[.*?\]\S* ([\w-]+)\(([^)]*)\)", re.MULTILINE)


def products(hlo: str) -> Counter[str]:
    """The matrix products and convolutions of a compiled program by their dtypes, such as `s8 x s8 -> s32`."""
    rows = _DEFINED.findall(hlo)
    dtypes = {name: dtype for name, dtype, _, _ in rows}
    found: Counter[str] = Counter()
    for _, result, operation, operands in rows:
        if operation in ("dot", "convolution"):
            names = [operand.split()[-1].lstrip("%") for operand in operands.split(",")[:2]]
            found[f"{' x '.join(dtypes.get(name, '?') for name in names)} -> {result}"] += 1
    return found
