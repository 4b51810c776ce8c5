"""What one transformer block communicates, counted in the program that XLA compiled for eight devices."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from maxdiffusion import parallel
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.context import Context
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.parallel import axes
from maxdiffusion.weights.loader import placed

CONFIG = DiTConfig(
    num_layers=3,
    num_attention_heads=8,
    attention_head_dim=12,
    ffn_dim=128,
    in_channels=4,
    out_channels=4,
    text_dim=32,
    freq_dim=32,
)
KINDS = "all-to-all|collective-permute|all-gather|all-reduce|reduce-scatter"
LINE = re.compile(rf" = \(?(\w+\[[\d,]*\]).*? ({KINDS})(?:-start)?\(")


def compiled(degrees, *, ulysses=1, rules=()):
    """A step of the transformer on prepared text, 2 examples of 4 x 4 x 8 tokens, weights bf16, activations fp32."""
    context, tensor = degrees.get("context", 1), degrees.get("tensor", 1)
    mesh = parallel.make_mesh(parallel.Degrees(**degrees), ulysses=ulysses)
    place = parallel.Placement(mesh, parallel.rules_for(rules))
    name = "ulysses_ring" if context > 1 else "dot_product"
    plan = AttentionPlan.parse(name, heads=8, context=context, ulysses_shards=ulysses, tensor=tensor)
    model = WanTransformer(CONFIG, plan, Dtypes(jnp.bfloat16, jnp.float32))
    graph, params = nnx.split(placed(model, place))

    def array(*shape):
        batch = place.dividing(axes.BATCH, shape[0])
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place.sharding(batch))

    with parallel.use(place):
        prepare = jax.jit(lambda params, text: nnx.merge(graph, params).prepare(Context(text)))
        text = jax.tree.map(lambda leaf: array(*leaf.shape), jax.eval_shape(prepare, params, array(2, 16, 32)))
        step = jax.jit(lambda params, *args: nnx.merge(graph, params)(*args))
        return step.lower(params, array(2, 4, 8, 16, 4), array(2), text).compile()


def per_layer(program):
    """(kind, shape on one device) of every collective inside of the loop over the layers."""
    inside = [line for line in program.as_text().splitlines() if "while/body" in line]
    return [(kind, shape) for line in inside for shape, kind in LINE.findall(line)]


@pytest.mark.parametrize(
    ("degrees", "rules"),
    [
        ({"fsdp": 2, "context": 4}, ()),
        pytest.param({"context": 8}, [("embed", ["fsdp", "context"])], marks=pytest.mark.slow),
    ],
)
def test_each_sharded_weight_is_gathered_once_per_layer_and_activations_never(degrees, rules):
    found = per_layer(compiled(degrees, ulysses=2, rules=rules))
    hops = degrees["context"] // 2 - 1
    assert Counter(kind for kind, _ in found) == {"all-gather": 8, "all-to-all": 4, "collective-permute": 2 * hops}
    # One layer of q, k, v and o of the self-attention, q and o of the cross-attention, and the feed-forward.
    gathered = Counter(shape for kind, shape in found if kind == "all-gather")
    assert gathered == {"f32[1,96,96]": 6, "f32[1,96,128]": 1, "f32[1,128,96]": 1}


def test_tensor_parallelism_sums_once_after_each_attention_and_the_feed_forward():
    found = per_layer(compiled({"tensor": 2, "context": 4}, ulysses=2))
    sums = Counter(shape for kind, shape in found if kind == "all-reduce")
    # Besides the three of the activations, sums of squares: q and k are normed over all heads (XLA joins the two).
    assert sums == {"f32[2,32,96]": 3, "f32[2,32]": 2}
    assert Counter(kind for kind, _ in found) - Counter({"all-reduce": 5}) == {"all-to-all": 4, "collective-permute": 2}


def test_each_data_shard_computes_its_half_of_the_guidance_pair():
    found = per_layer(compiled({"data": 2, "context": 4}, ulysses=2))
    assert Counter(kind for kind, _ in found) == {"all-to-all": 4, "collective-permute": 2}
    assert {shape.split("[")[1].split(",")[0] for _, shape in found} == {"1"}  # one example of the two
