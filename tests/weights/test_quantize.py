"""Weights that become 8 bits while they stream: their arithmetic, what stays as stored, and every device's share."""

import dataclasses
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from maxdiffusion import parallel
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.hardware.quantization import Quantization
from maxdiffusion.weights import mapping, nets
from maxdiffusion.weights.checkpoint import open_checkpoint
from maxdiffusion.weights.quantize import by_row
from maxdiffusion.weights.sources import TensorSource, plus, row_slice, scaled

LARGEST = {"int8": 127, "float8_e4m3fn": 448}
NAMES = {"F32": np.float32, "I8": np.int8, "F8_E4M3": ml_dtypes.float8_e4m3fn}
MODEL = Path(__file__).parents[2] / "models" / "wan_tiny"


def source(array, dtype="F32"):
    """A tensor of these numbers; `reads` are the rows that were asked for."""
    array, reads = np.asarray(array).astype(NAMES[dtype]), []

    def rows(start, stop):
        reads.append((start, stop))
        return array[start:stop]

    return TensorSource("w", dtype, array.shape, Path("f"), 0, array.nbytes, dtype, rows), reads


@pytest.fixture
def weight():
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((6, 50)).astype(np.float32) * np.exp(draw.standard_normal((6, 1))).astype(np.float32)
    weight[2] = 0
    return weight


def whole(tensor):
    return tensor.rows(0, tensor.shape[0])


@pytest.mark.parametrize("dtype", LARGEST)
def test_each_row_has_its_scale(weight, dtype):
    tensor, reads = source(weight)
    values, scale = by_row(tensor, dtype)
    assert values.nbytes == tensor.nbytes and scale.nbytes == 0  # each byte is read once
    np.testing.assert_array_equal(np.concatenate([values.rows(0, 4), values.rows(4, 6)]), whole(values))
    del reads[:]
    want = np.abs(weight).max(1) / np.float32(LARGEST[dtype])
    want[2] = 1
    np.testing.assert_array_equal(whole(scale), want)
    assert not reads  # nothing for the scales
    grid = weight / want[:, None]
    grid = np.rint(grid) if dtype == "int8" else grid
    np.testing.assert_array_equal(whole(values), grid.astype(dtype))
    alone = by_row(source(weight)[0], dtype)[1]  # where no value of the rows is on this host
    np.testing.assert_array_equal(alone.rows(1, 4), want[1:4])


@pytest.mark.parametrize("by", ["tensor", "row"])
@pytest.mark.parametrize(("dtype", "stored"), [("int8", "I8"), ("float8_e4m3fn", "F8_E4M3")])
def test_a_file_of_the_same_scheme_stays_in_its_bits(weight, dtype, stored, by):
    bits = source(weight * 9, stored)[0]
    scales = np.array([[0.5], [2], [3], [4], [5], [6]], np.float32) if by == "row" else np.float32([0.5])
    tensor = row_slice(scaled(bits, source(scales)[0]), 2, 3)  # a third of fused rows, say
    values, scale = by_row(tensor, dtype)
    assert not values.computed
    np.testing.assert_array_equal(whole(values).view(np.uint8), whole(bits)[2:5].view(np.uint8))
    np.testing.assert_array_equal(whole(scale), np.broadcast_to(scales.reshape(-1)[2:5] if by == "row" else 0.5, 3))
    merged, delta = by_row(plus(tensor, source(np.ones((3, 50)))[0]), dtype), whole(tensor) + 1  # a LoRA: anew
    assert merged[0].computed
    error = np.abs(whole(merged[0]).astype(np.float32) * whole(merged[1])[:, None] - delta)
    assert (error <= np.abs(delta).max(1, keepdims=True) / (250 if dtype == "int8" else 16)).all()


def test_other_schemes_are_rounded_anew(weight):
    fp8 = scaled(source(weight, "F8_E4M3")[0], source(np.float32([2]))[0])
    values, scale = by_row(fp8, "int8")
    assert values.computed and np.abs(whole(values)).max() == 127
    np.testing.assert_allclose(whole(values) * whole(scale)[:, None], whole(fp8), atol=np.abs(whole(fp8)).max() / 250)


def test_a_number_that_is_not_finite(weight):
    weight[4, 4] = np.inf
    with pytest.raises(UserError, match="f stores numbers in 'w' that are not finite"):
        whole(by_row(source(weight)[0], "int8")[0])


def test_a_network_is_filled_alike_on_one_and_on_eight_devices():
    """Fsdp 2 x tensor 2 x context 2: kernels and scales lie in the shards that bf16 has."""
    checkpoint = open_checkpoint(MODEL)
    checkpoint = dataclasses.replace(checkpoint, nets={"transformer": checkpoint.nets["transformer"]})
    build = nets.builders(
        AttentionPlan(), weights_dtype="bfloat16", dtype="bfloat16", quantization=Quantization("int8")
    )
    mesh = parallel.make_mesh(parallel.Degrees(fsdp=2, tensor=2, context=2))
    one, eight = (
        mapping.parameters(nets.Nets(checkpoint, build, place).load("transformer"))
        for place in (None, parallel.Placement(mesh, parallel.rules_for()))
    )
    assert one.keys() == eight.keys()
    for name, param in one.items():
        np.testing.assert_array_equal(param[...], eight[name][...], err_msg=name)
    in_8_bits = {name for name, param in one.items() if param.dtype == np.int8}
    assert {name.split(".")[0] for name in in_8_bits} == {"blocks"} and len(in_8_bits) == 10
    kernel, scale = eight["blocks.ffn.linear_1.kernel"][...], eight["blocks.ffn.linear_1.kernel_scale"][...]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    assert scale.addressable_shards[0].data.size * 2 == scale.size
    assert isinstance(kernel, jax.Array)
