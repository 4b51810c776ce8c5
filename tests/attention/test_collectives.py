"""What one self-attention communicates, counted in the program that XLA compiled."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxdiffusion import parallel
from maxdiffusion.attention import AttentionPlan, cross_attention, self_attention
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


@pytest.mark.parametrize(("ring", "ulysses", "masked"), [(1, 8, True), (2, 4, False), (2, 4, True), (4, 1, True)])
def test_self_attention(ring, ulysses, masked):
    plan = AttentionPlan("ulysses_ring", "dot_product", ring, ulysses, 8)
    want = {"all-to-all": 4 * (ulysses > 1), "collective-permute": 2 * (ring - 1)}
    got = collectives(lambda *a: self_attention(plan, *a), ring, ulysses, 32, masked=masked)
    assert got == Counter({name: count for name, count in want.items() if count})


def test_padding_adds_no_exchange_of_keys():
    plan = AttentionPlan("ulysses_ring", "dot_product", 2, 4, 8)
    got = collectives(lambda *a: self_attention(plan, *a), 2, 4, 29)
    assert got["all-to-all"] == 4 and got["collective-permute"] == 2


def test_cross_attention_communicates_nothing():
    plan = AttentionPlan("ulysses_ring", "dot_product", 2, 4, 8)
    assert not collectives(lambda *a: cross_attention(plan, *a), 2, 4, 32, masked=True, keys=7)
