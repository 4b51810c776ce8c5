"""The device order on slices as libtpu describes them."""

import json

import pytest

from tests.support.slices import SLICES, context, slice_of
from tests.support.tpu_compiler import needs_libtpu, run

pytestmark = needs_libtpu

PROGRAM = """
import json, sys
from jax.experimental import topologies
from tests.support.slices import context

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
degrees = [u for u in range(1, len(devices) + 1) if len(devices) % u == 0]
print(json.dumps({u: context(devices, u).tolist() for u in degrees}))
"""


@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4", "v5p:2x2x2", "TPU7x:2x2x2"])
def test_every_split_is_that_of_the_coordinates(topology):
    for ulysses, places in json.loads(run(topology, PROGRAM)).items():
        assert places == context(slice_of(*SLICES[topology]), int(ulysses)).tolist()
