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

# Seconds of the linear layers of a 14B block with dynamic quantisation, and of what it adds to other passes, in units
# of those in bf16: two layers at 18,900 tokens (v5p 37,800) by `scripts/tpu.py memory`. Never timed. fp8 on v5p, which
# was not compiled, is v5e's.
_SECONDS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "v5e": {"int8": 0.51, "float8_e4m3fn": 1.00},
        "v5p": {"int8": 0.52, "float8_e4m3fn": 1.00},
        "v6e": {"int8": 0.88, "float8_e4m3fn": 1.09},
        "TPU7x": {"int8": 1.17, "float8_e4m3fn": 0.59},
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


# The factor of `SECONDS` below which `auto` rounds activations too; int8 on v6e would save 2 % of a step.
GAIN = 0.8


def choose(name: str, device_kind: str) -> Quantization | None:
    """The quantisation that a config names: `none`, `int8`, `fp8` (e4m3), or `auto` for what the device gains from.

    `auto` is the fastest product where one takes less than `GAIN` of bf16's time, else int8 weights alone.
    """
    if name == "none":
        return None
    if name != "auto":
        return Quantization(DTYPES[name])
    factors = SECONDS.get(device_kind, {})
    best = min(factors, key=lambda dtype: factors[dtype], default="int8")
    return Quantization(best) if factors.get(best, 1.0) < GAIN else Quantization("int8", products=False)


def seconds(quantization: Quantization | None, device_kind: str) -> float:
    """Seconds of quantised linear layers, in units of those in bf16; 1 where it is not known."""
    if quantization is None or not quantization.products:
        return 1.0
    return SECONDS.get(device_kind, {}).get(quantization.dtype, 1.0)
