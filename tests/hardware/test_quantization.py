"""The choice of 8-bit products by the kind of device."""

import pytest

from maxdiffusion.hardware.chips import GENERATIONS
from maxdiffusion.hardware.quantization import GAIN, Quantization, choose, seconds

CHOSEN = {
    "v5e": Quantization("int8"),
    "v5p": Quantization("int8"),
    "v6e": Quantization("int8", products=False),
    "TPU7x": Quantization("float8_e4m3fn"),
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_auto_is_never_slower_than_bf16_by_the_table(name):
    kind = GENERATIONS[name].kind
    assert choose("auto", kind) == CHOSEN[name]
    found = seconds(choose("auto", kind), kind)
    assert found <= 1
    named = [seconds(choose(given, kind), kind) for given in ("int8", "fp8")]
    assert found <= min(named) or min(named) >= GAIN


def test_what_is_named_is_taken():
    for kind in ("TPU v6 lite", "cpu", "NVIDIA H100"):
        assert choose("none", kind) is None
        assert choose("int8", kind) == Quantization("int8") and choose("fp8", kind) == Quantization("float8_e4m3fn")
    assert choose("auto", "cpu") == Quantization("int8", products=False) and seconds(choose("int8", "cpu"), "cpu") == 1
