"""One attention compiled for TPUs that are not there: what it communicates, beside what."""

import pytest

from tests.support.tpu_compiler import needs_libtpu, run

pytestmark = [pytest.mark.slow, needs_libtpu]

PROGRAM = """
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from maxdiffusion import parallel
from maxdiffusion.attention.api import self_attention
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.attention.options import KernelOptions

topology, scheme, kernel, tokens = *sys.argv[1:4], int(sys.argv[4])
ring, ulysses, blocks = int(sys.argv[5]), int(sys.argv[6]), json.loads(sys.argv[7])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
count = len(devices)
plan = AttentionPlan(scheme, kernel, ring, ulysses, 40, options=KernelOptions(**blocks))
mesh = parallel.make_mesh(parallel.Degrees(context=count), ulysses=ulysses, devices=devices)
place = parallel.Placement(mesh, parallel.rules_for())
spec = place.sharding(None, "sequence" if tokens % count == 0 else None, None, None)
x = jax.ShapeDtypeStruct((1, tokens, 40, 128), jnp.bfloat16, sharding=spec)
with parallel.use(place):
    lowered = jax.jit(lambda *a: self_attention(plan, *a)).lower(x, x, x)
    text = lowered.compile(parallel.compiler_options()).as_text()
letters = {"collective-permute-start": "<", "collective-permute-done": ">", "all-gather": "G"}
letters |= {"all-to-all": "a", "all-to-all-start": "a"}
for line in text[text.index("ENTRY"):].splitlines():
    if 'custom_call_target="tpu_custom_call"' in line:
        print("K", end="")
    elif event := re.search(f" ({'|'.join(letters)})\\(", line):
        print(letters[event.group(1)], end="")
"""
SMALL = '{"block_q": 1024, "block_kv": 512, "block_kv_compute": 256}'  # compile in seconds, not in minutes


def compiled(topology, scheme, kernel, tokens, ring=1, ulysses=1, blocks="{}"):
    """The collectives and kernels of the program in issue order: permutation <>, kernel K, all-to-all a, gather G."""
    return run(topology, PROGRAM, scheme, kernel, tokens, ring, ulysses, blocks)


@pytest.mark.parametrize("tokens", [75_600, 32_760])
@pytest.mark.parametrize("ring", [2, 4, 8])
@pytest.mark.parametrize("kernel", ["flash", "splash", "tokamax_splash"])
def test_every_rotation_lies_beside_a_kernel_and_none_is_left_after_the_last(kernel, ring, tokens):
    events = compiled("v6e:2x4", "ulysses_ring", kernel, tokens, ring, 8 // ring, SMALL)
    assert events.replace("a", "") == "<<K>>" * (ring - 1) + "K"
    assert events.count("a") == (4 if ring < 8 else 0)


@pytest.mark.parametrize("scheme", ["ulysses", "local"])
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4", "v5p:2x2x1", "TPU7x:2x2x1"])
def test_the_longest_sequence_compiles_on_every_generation(topology, scheme):
    """With the blocks that are chosen for it."""
    devices = 4 if topology.startswith("v5p") else 8
    events = compiled(topology, scheme, "flash", 75_600, ulysses=devices if scheme == "ulysses" else 1)
    gathers = "" if topology.startswith("TPU7x") else "GG"  # that one's SparseCores gather, in calls of their own
    assert events == {"ulysses": "aaaKa", "local": f"{gathers}K"}[scheme]
