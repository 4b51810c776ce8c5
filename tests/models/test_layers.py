"""What the networks share, where no parity test of theirs would see it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxdiffusion import parallel
from maxdiffusion.models.layers import Dtypes, Linear, layer_norm
from maxdiffusion.parallel import axes
from maxdiffusion.weights.loader import placed


@pytest.mark.parametrize(
    ("mean", "massive", "most"), [(0, 0, 1e-6), (0, 1e4, 1e-6), (10, 0, 1e-5), (30, 0, 1e-4), (300, 0, 1e-2)]
)
def test_a_variance_of_one_pass(mean, massive, most):
    """5,120 features, of deviation 1 about a mean; one of them as large as some are in trained transformers."""
    x = mean + np.random.default_rng(0).standard_normal((64, 5120))
    x[:, 7] += massive
    x = x.astype(np.float32)
    wide = x.astype(np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    got = jax.jit(lambda x: layer_norm(x, 1e-6))(x)
    assert np.abs(got - want).max() < most * np.abs(want).max()


def test_features_that_are_all_alike_give_nothing():
    assert not layer_norm(jnp.full((2, 5120), 1 / 3), 1e-6).any()


@pytest.mark.parametrize(("weights", "activations"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_sharded_weight_is_gathered_in_the_narrower_dtype(weights, activations):
    """In the program as it is lowered: XLA's CPU backend gathers bf16 as fp32, whatever is asked of it."""
    place = parallel.Placement(parallel.make_mesh(parallel.Degrees(fsdp=8)), parallel.rules_for())
    graph, params = nnx.split(placed(Linear(64, 32, (axes.EMBED, axes.MLP), Dtypes(weights, activations)), place))
    x = jax.ShapeDtypeStruct((8, 4, 64), jnp.float32, sharding=place.sharding(axes.BATCH))
    with parallel.use(place):
        lowered = jax.jit(lambda params, x: nnx.merge(graph, params)(x)).lower(params, x)
    assert re.findall(r"sharding_constraint.*: tensor<64x32x(\w+)>", lowered.as_text()) == ["bf16"]
    assert "all-gather" in lowered.compile().as_text()
