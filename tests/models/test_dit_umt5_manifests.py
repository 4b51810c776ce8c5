"""Every tensor of the official checkpoints has its place, with the right shape, and every parameter its axes."""

import gzip
import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.umt5.encoder import UMT5Encoder
from maxdiffusion.parallel import axes
from maxdiffusion.variants import get
from maxdiffusion.weights import official
from maxdiffusion.weights.tables import dit, umt5
from tests.support.parity import match, paths

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"


def transformer(config, dtypes):
    return WanTransformer(config, AttentionPlan(), dtypes)


# manifest -> net, class, names
CASES = {
    "wan2.1-t2v-1.3b": ("transformer", transformer, dit.RULES),
    "wan2.1-t2v-14b": ("transformer", transformer, dit.RULES),
    "umt5-xxl-encoder": ("text_encoder", UMT5Encoder, umt5.RULES),
}


def made(name):
    net, cls, _ = CASES[name]
    config = official.configs(get(name if net == "transformer" else "wan2.1-t2v-14b"))[net]
    return cls(config, Dtypes(jnp.bfloat16, jnp.bfloat16))


@pytest.mark.parametrize("name", CASES)
def test_the_name_table_covers_the_official_checkpoint_both_ways(name):
    rules = CASES[name][-1]
    params = {path: param.shape for path, param in paths(made(name)).items()}
    with gzip.open(MANIFESTS / f"{name}.json.gz") as file:
        manifest = json.load(file)
    unfilled = {
        (path, layer) for path, shape in params.items() for layer in ((None,), range(shape[0]))[is_stacked(path)]
    }
    for tensor, shape in manifest.items():
        rule, path, layer = match(rules, tensor)
        shape = tuple(shape[axis] for axis in rule.transform.value or range(len(shape)))
        expected = params[path] if layer is None else params[path][1:]
        if rule.reshape:
            assert math.prod(shape) == math.prod(expected), tensor
        else:
            assert shape == expected, tensor
        unfilled.discard((path, layer))
    assert not unfilled


def is_stacked(path):
    return path.startswith(("blocks.", "block."))


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_carries_its_logical_axes(name):
    known = {None, axes.EMBED, axes.HEADS, axes.MLP, axes.VOCAB, axes.LAYERS}
    for path, param in paths(made(name)).items():
        logical = param.get_metadata()["out_sharding"]
        assert len(logical) == len(param.shape), path
        assert set(logical) <= known, path
        assert (logical[0] == axes.LAYERS) == is_stacked(path), path
        if len(param.shape) - is_stacked(path) == 2 and min(param.shape[-2:]) > 100:
            assert axes.EMBED in logical, f"{path} is large and sharded nowhere"


def test_axes_of_the_large_kernels():
    block = made("wan2.1-t2v-1.3b").blocks
    for attention in (block.attn1, block.attn2):
        for projection in (attention.to_q, attention.to_k, attention.to_v):
            assert projection.kernel.out_sharding == ("layers", "embed", "heads")
            assert projection.bias.out_sharding == ("layers", "heads")
        assert attention.to_out.kernel.out_sharding == ("layers", "heads", "embed")
    assert block.ffn.linear_1.kernel.out_sharding == ("layers", "embed", "mlp")
    assert block.ffn.linear_2.kernel.out_sharding == ("layers", "mlp", "embed")
