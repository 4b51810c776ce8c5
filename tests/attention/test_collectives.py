"""What one self-attention communicates, counted in the program that XLA compiled."""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxdiffusion import parallel
from maxdiffusion.attention.api import cross_attention, self_attention
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.parallel import axes

COLLECTIVE = re.compile(r" = .*? (all-to-all|collective-permute|all-gather|all-reduce|reduce-scatter)(?:-start)?\(")


def collectives(attend, ring, ulysses, tokens, *, masked=False, keys=None):
    devices = jax.devices()[: ring * ulysses]
    mesh = parallel.make_mesh(parallel.Degrees(context=ring * ulysses), ulysses=ulysses, devices=devices)
    place = parallel.Placement(mesh, parallel.rules_for())
    whole = NamedSharding(place.mesh, PartitionSpec())
    split = place.sharding(None, axes.SEQUENCE, None, None) if tokens % (ring * ulysses) == 0 else whole

    def array(length, sharding, *rest, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((2, length, *rest), dtype, sharding=sharding)

    q = array(tokens, split, 8, 4)
    kv = q if keys is None else array(keys, whole, 8, 4)
    mask = array(kv.shape[1], whole, dtype=bool) if masked else None
    with parallel.use(place):
        text = jax.jit(attend).lower(q, kv, kv, mask).compile().as_text()
    return Counter(COLLECTIVE.findall(text))


@pytest.mark.parametrize(
    ("ring", "ulysses", "chunks", "direction", "masked"),
    [
        (1, 8, 1, "one_way", True),
        (2, 4, 1, "one_way", False),
        (2, 4, 1, "one_way", True),
        (4, 1, 1, "one_way", True),
        (1, 2, 4, "one_way", False),
        (2, 2, 2, "one_way", True),
        (4, 2, 1, "two_way", True),
        (4, 2, 2, "two_way", False),
    ],
)
def test_self_attention(ring, ulysses, chunks, direction, masked):
    plan = AttentionPlan("ulysses_ring", "dot_product", ring, ulysses, 8, chunks=chunks, ring_direction=direction)
    permutations = (4 if direction == "two_way" else 2) * (ring - 1)
    want = {"all-to-all": 4 * chunks * (ulysses > 1), "collective-permute": permutations * chunks}
    got = collectives(lambda *a: self_attention(plan, *a), ring, ulysses, 32, masked=masked)
    assert got == Counter({name: count for name, count in want.items() if count})


def moved(plan, tokens=32):
    """Elements that one device sends by permutation, one count for each direction of the ring."""
    mesh = parallel.make_mesh(
        parallel.Degrees(context=plan.context), ulysses=plan.ulysses, devices=jax.devices()[: plan.context]
    )
    place = parallel.Placement(mesh, parallel.rules_for())
    x = jax.ShapeDtypeStruct((1, tokens, 8, 4), jnp.float32, sharding=place.sharding(None, axes.SEQUENCE, None, None))
    with parallel.use(place):
        text = jax.jit(lambda *a: self_attention(plan, *a)).lower(x, x, x).compile().as_text()
    counts = Counter()
    for line in text.splitlines():
        if found := re.search(
            r"f32\[([\d,]+)\].* collective-permute(?:-start)?\(.*source_target_pairs=\{\{0,(\d+)", line
        ):
            counts[int(found[2])] += math.prod(map(int, found[1].split(",")))
    return counts


def test_two_ways_send_the_same_in_halves():
    one, two = (
        moved(AttentionPlan("ring", "dot_product", 4, 1, 8, ring_direction=way)) for way in ("one_way", "two_way")
    )
    assert set(one) == {1} and set(two) == {1, 3}
    assert two[1] == two[3] == one[1] / 2 == 3 * 8 * 8 * 4


def test_padding_adds_no_exchange_of_keys():
    plan = AttentionPlan("ulysses_ring", "dot_product", 2, 4, 8)
    got = collectives(lambda *a: self_attention(plan, *a), 2, 4, 29)
    assert got["all-to-all"] == 4 and got["collective-permute"] == 2


def test_cross_attention_communicates_nothing():
    plan = AttentionPlan("ulysses_ring", "dot_product", 2, 4, 8)
    assert not collectives(lambda *a: cross_attention(plan, *a), 2, 4, 32, masked=True, keys=7)
