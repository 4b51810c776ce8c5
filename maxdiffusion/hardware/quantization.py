"""Linear layers in 8 bits: the choices, and which of them each chip gains from. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from maxdiffusion.hardware.chips import GENERATIONS


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How linear layers are stored and multiplied.

    Attributes:
      dtype: of the weights on the devices, `int8` or `float8_e4m3fn`; they have an fp32 scale per output channel.
      products: activations are quantised per token, too, and the product is in 8 bits; otherwise the weights are
        widened to the activations' dtype before each product, and only memory is saved.
    """

    dtype: str
    products: bool = True

    def __str__(self) -> str:
        if self.products:
            return f"{self.dtype} weights and activations"
        return f"{self.dtype} weights, widened before each product"


DTYPES: Mapping[str, str] = MappingProxyType({"int8": "int8", "fp8": "float8_e4m3fn"})  # by the names of `choose`
# The largest magnitude that is used of each dtype.
LARGEST: Mapping[str, float] = MappingProxyType({"int8": 127.0, "float8_e4m3fn": 448.0})

# Seconds of the linear layers of a 14B block (six 5120^2, 5120 x 13824 and back) with dynamic quantisation, in units of
# those in bf16. From the TPU compiler's estimated cycles at 9450 tokens, each layer with a quantise pass of its own; an
# upper bound, as q, k and v share one here. Never timed. v5p was not compiled: v5e's, whose products gain less (2.0
# times in int8 against 2.24; e4m3 0.97 against 1.09).
_SECONDS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "v5e": {"int8": 0.79, "float8_e4m3fn": 1.30},
        "v5p": {"int8": 0.79, "float8_e4m3fn": 1.30},
        "v6e": {"int8": 1.45, "float8_e4m3fn": 1.68},
        "TPU7x": {"int8": 1.44, "float8_e4m3fn": 0.92},
    }
)
SECONDS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {GENERATIONS[name].kind: factors for name, factors in _SECONDS.items()}
)


# Cycles of a tile of the flash kernel with q and k in e4m3, in units of those in bf16 (`planning.predict`).
ATTENTION: Mapping[str, float] = MappingProxyType({GENERATIONS["TPU7x"].kind: 0.75})


def of_attention(kernel: str, device_kind: str) -> str:
    """What attention_quantization=fp8 does on a kind of device, in a line of the log."""
    if kernel == "flash" and device_kind in ATTENTION:
        how = f"multiplied in 8 bits, in {ATTENTION[device_kind]} of the time by the compiler's count"
    else:
        how = "widened before their product, which is no faster"
    return f"attention_quantization=fp8: q and k of self-attention in float8_e4m3fn, {how} ({kernel}, {device_kind})"


def choose(name: str, device_kind: str) -> Quantization | None:
    """The quantisation that a config names: `none`, `int8`, `fp8` (e4m3), or `auto` for what the device gains from.

    `auto` is the fastest product where one is faster than in bf16, else int8 weights alone.
    """
    if name == "none":
        return None
    if name != "auto":
        return Quantization(DTYPES[name])
    factors = SECONDS.get(device_kind, {})
    best = min(factors, key=lambda dtype: factors[dtype], default="int8")
    return Quantization(best) if factors.get(best, 1.0) < 1 else Quantization("int8", products=False)


def seconds(quantization: Quantization | None, device_kind: str) -> float:
    """Seconds of quantised linear layers, in units of those in bf16; 1 where it is not known."""
    if quantization is None or not quantization.products:
        return 1.0
    return SECONDS.get(device_kind, {}).get(quantization.dtype, 1.0)
