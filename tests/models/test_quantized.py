"""Linear layers in 8 bits against arithmetic in float64, and against qwix."""

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  registers float8
import numpy as np
import pytest
import qwix
from flax import nnx

from maxdiffusion.hardware.quantization import Quantization
from maxdiffusion.models.layers import Dtypes, Linear
from maxdiffusion.models.quantized import Quantized, product, products, quantize
from maxdiffusion.parallel import axes

LARGEST = {"int8": 127, "float8_e4m3fn": 448}
DTYPES = [*LARGEST]


def rounded(x, dtype, axis):
    """`x` on the grid of `dtype` and its scale, in float64."""
    scale = np.abs(x).max(axis, keepdims=True) / LARGEST[dtype]
    values = x / scale
    return (np.rint(values) if dtype == "int8" else values.astype(np.float32).astype(dtype)).astype(np.float64), scale


def layer(dtype, kernel, bias, products=True):
    quantization = Quantization(dtype, products)
    linear = Linear(*kernel.shape, (axes.EMBED, axes.MLP), Dtypes("float32", "float32", quantization))
    values, scale = rounded(kernel.astype(np.float64), dtype, 0)
    graph, state = nnx.split(linear)
    arrays = {"kernel": values.astype(dtype), "kernel_scale": scale[0].astype(np.float32), "bias": bias}
    return (
        nnx.merge(graph, jax.tree.map_with_path(lambda path, _: jnp.asarray(arrays[path[0].key]), state)),
        values,
        scale,
    )


@pytest.fixture
def numbers():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((3, 7, 64)) * np.exp(draw.standard_normal((3, 7, 1)))  # tokens of unlike sizes
    return x.astype(np.float32), *(draw.standard_normal(shape).astype(np.float32) for shape in ((64, 40), (40,)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_is_the_product_of_rounded_numbers(dtype, numbers):
    x, kernel, bias = numbers
    linear, values, scale = layer(dtype, kernel, bias)
    q, s = rounded(x.astype(np.float64), dtype, -1)
    want = (q @ values) * s * scale + bias
    got = np.asarray(jax.jit(lambda x: linear(x))(x))
    assert got.dtype == np.float32
    # A quotient on the edge between two of the grid may fall on either side in fp32: one in a thousand at most.
    close = np.abs(got - want) < 1e-4 * np.abs(want).max()
    assert close.mean() > 0.99
    exact = x.astype(np.float64) @ kernel + bias
    error = np.sqrt(np.square(got - exact).mean() / np.square(exact).mean())
    print(f"{dtype}: {100 * error:.2f} % of the layer's output")
    assert error < {"int8": 0.015, "float8_e4m3fn": 0.05}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_alone_leave_the_activations(dtype, numbers):
    x, kernel, bias = numbers
    linear, values, scale = layer(dtype, kernel, bias, products=False)
    np.testing.assert_allclose(
        linear(jnp.asarray(x)), x.astype(np.float64) @ (values * scale) + bias, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_that_of_qwix(dtype, numbers):
    x, kernel, _ = numbers
    x = x.reshape(-1, x.shape[-1])
    theirs = [
        qwix.quantize(array, dtype, channelwise_axes=[axis], calibration_method="absmax")
        for array, axis in ((x, 0), (kernel, 1))
    ]
    dimensions = (((1,), (0,)), ((), ()))
    want = qwix.dot_general(*theirs, dimensions)
    a, b = theirs
    got = product(Quantized(a.qvalue, a.scale), b.qvalue) * b.scale[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_tokens_without_magnitude_and_the_largest_ones():
    x = jnp.array([[0.0, 0, 0, 0], [1e30, -1e30, 1, 0], [448.00003, 1, -448.00003, 0]])
    for dtype in DTYPES:
        values, scale = quantize(x, dtype)
        assert np.isfinite(np.asarray(values, np.float32)).all() and (np.asarray(scale) > 0).all()
        np.testing.assert_allclose((values.astype(jnp.float32) * scale)[:, :3:2], x[:, :3:2], rtol=0.07, atol=1e29)


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(fault, numbers):
    x, kernel, bias = numbers
    x[1, 2, 3] = fault
    y = np.asarray(layer("int8", kernel, bias)[0](jnp.asarray(x)))
    assert not np.isfinite(y[1, 2]).any() and np.isfinite(np.delete(y.reshape(21, -1), 9, 0)).all()


@pytest.mark.parametrize(("dtype", "wide"), [("int8", "s32"), ("float8_e4m3fn", "f32")])
def test_the_dtypes_of_products_are_read_from_a_program(dtype, wide):
    """XLA's CPU backend multiplies int8 as it is and widens fp8; which the text shows."""
    x, kernel = jnp.ones((4, 8), dtype), jnp.ones((8, 2), dtype)
    compiled = jax.jit(lambda x, k: product(Quantized(x, jnp.ones((4, 1))), k)).lower(x, kernel).compile()
    (found,) = products(compiled.as_text())
    assert found.endswith(f"-> {wide}") and found.startswith("s8 x s8" if dtype == "int8" else "f32 x f32")
