"""One attention compiled for TPUs that are not there: what it communicates, beside what."""

import pytest

from tests.tpu.compiler import needs_libtpu, run

pytestmark = [pytest.mark.slow, needs_libtpu]

PROGRAM = """
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from maxdiffusion import parallel
from maxdiffusion.attention import AttentionPlan, self_attention

topology, name, ulysses, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
count = len(devices)
plan = AttentionPlan.parse(name, heads=40, context=count, ulysses_shards=ulysses, platform="tpu")
mesh = parallel.make_mesh(parallel.Degrees(context=count), ulysses=plan.ulysses, devices=devices)
place = parallel.Placement(mesh, parallel.rules_for())
spec = place.sharding(None, "sequence" if tokens % count == 0 else None, None, None)
x = jax.ShapeDtypeStruct((1, tokens, 40, 128), jnp.bfloat16, sharding=spec)
with parallel.use(place):
    text = jax.jit(lambda *a: self_attention(plan, *a)).lower(x, x, x).compile().as_text()
letters = {"collective-permute-start": "<", "collective-permute-done": ">", "all-to-all": "a", "all-gather": "G"}
for line in text.splitlines():
    if 'custom_call_target="tpu_custom_call"' in line:
        print("K", end="")
    elif event := re.search(f" ({'|'.join(letters)})\\(", line):
        print(letters[event.group(1)], end="")
"""


def compiled(topology, name, ulysses, tokens):
    """The collectives and kernels of the program in issue order: permutation <>, kernel K, all-to-all a, gather G."""
    return run(topology, PROGRAM, name, ulysses, tokens)


@pytest.mark.parametrize("tokens", [75_600, 32_760])
@pytest.mark.parametrize("ulysses", [4, 2])
def test_every_rotation_lies_beside_a_kernel_and_none_is_left_after_the_last(ulysses, tokens):
    hops = 8 // ulysses
    events = compiled("v6e:2x4", "ulysses_ring", ulysses, tokens).replace("a", "")
    assert events == "<<K>>" * (hops - 1) + "K"


@pytest.mark.parametrize("name", ["auto", "flash"])
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4", "v5p:2x2x1", "TPU7x:2x2x1"])
def test_the_longest_sequence_compiles_on_every_generation(topology, name):
    events = compiled(topology, name, -1, 75_600)
    assert events == {"auto": "aaaKa", "flash": "GGK"}[name]
