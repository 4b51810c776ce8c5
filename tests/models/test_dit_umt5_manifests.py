"""Every tensor of the official checkpoints has its place, with the right shape, and every parameter its axes."""

import gzip
import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from maxdiffusion.attention import AttentionPlan
from maxdiffusion.models.dit import DiTConfig, WanTransformer
from maxdiffusion.models.umt5 import UMT5Config, UMT5Encoder
from maxdiffusion.parallel import axes
from maxdiffusion.weights.tables import dit, umt5
from tests.parity import match, paths

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"
BF16 = {"weights_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}


def wan(layers, heads, ffn):
    config = DiTConfig(
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=128,
        ffn_dim=ffn,
        in_channels=16,
        out_channels=16,
        text_dim=4096,
    )
    return nnx.eval_shape(lambda: WanTransformer(config, AttentionPlan(), rngs=nnx.Rngs(0), **BF16))


def text_encoder():
    config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    return nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0), **BF16))


CASES = {
    "wan2.1-t2v-1.3b": (lambda: wan(30, 12, 8960), dit.RULES),
    "wan2.1-t2v-14b": (lambda: wan(40, 40, 13824), dit.RULES),
    "umt5-xxl-encoder": (text_encoder, umt5.RULES),
}


@pytest.mark.parametrize("name", CASES)
def test_the_name_table_covers_the_official_checkpoint_both_ways(name):
    make, rules = CASES[name]
    params = {path: param.shape for path, param in paths(make()).items()}
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
    for path, param in paths(CASES[name][0]()).items():
        logical = param.get_metadata()["out_sharding"]
        assert len(logical) == len(param.shape), path
        assert set(logical) <= known, path
        assert (logical[0] == axes.LAYERS) == is_stacked(path), path
        if len(param.shape) - is_stacked(path) == 2 and min(param.shape[-2:]) > 100:
            assert axes.EMBED in logical, f"{path} is large and sharded nowhere"


def test_axes_of_the_large_kernels():
    block = wan(2, 12, 8960).blocks
    for attention in (block.attn1, block.attn2):
        for projection in (attention.to_q, attention.to_k, attention.to_v):
            assert projection.kernel.out_sharding == ("layers", "embed", "heads")
            assert projection.bias.out_sharding == ("layers", "heads")
        assert attention.to_out.kernel.out_sharding == ("layers", "heads", "embed")
    assert block.ffn.linear_1.kernel.out_sharding == ("layers", "embed", "mlp")
    assert block.ffn.linear_2.kernel.out_sharding == ("layers", "mlp", "embed")
