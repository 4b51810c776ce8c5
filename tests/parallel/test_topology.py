"""Which chips share a Ulysses group and which a ring, from their coordinates."""

import itertools

import numpy as np
import pytest

from maxdiffusion.parallel import Degrees, make_mesh
from maxdiffusion.parallel.topology import walk
from tests.support.slices import SLICES, context, slice_of


def far(a, b):
    return np.abs(a - b).sum(-1)


# (slice, R, U) -> the most links between two of a Ulysses group, and the links of every hop of a ring. A hop of two
# links goes between groups that are adjacent; an open line has one long hop, on links that no other hop uses.
WANT = {
    ("v5e:2x4", 8): (0, [1] * 8),
    ("v5e:2x4", 4): (1, [1, 1, 1, 3]),
    ("v5e:2x4", 2): (2, [2, 2]),
    ("v5e:2x4", 1): (4, [0]),
    ("v5p:2x2x2", 8): (0, [1] * 8),
    ("v5p:2x2x2", 4): (1, [1] * 4),
    ("v5p:2x2x2", 2): (2, [1, 1]),
    ("v5p:2x2x2", 1): (3, [0]),
    ("TPU7x:2x2x2", 16): (0, [1] * 16),
    ("TPU7x:2x2x2", 8): (1, [1] * 8),
    ("TPU7x:2x2x2", 4): (2, [1] * 4),
    ("TPU7x:2x2x2", 2): (3, [1, 1]),
    ("TPU7x:2x2x2", 1): (4, [0]),
    ("v6e:4x4", 16): (0, [1] * 16),
    ("v6e:4x4", 8): (1, [2, 1, 1, 1] * 2),
    ("v6e:4x4", 4): (2, [2] * 4),
    ("v6e:4x4", 2): (4, [2, 2]),
    ("v6e:4x4", 1): (6, [0]),
    ("v5p:2x2x4", 16): (0, [1] * 16),
    ("v5p:2x2x4", 8): (1, [1] * 8),
    ("v5p:2x2x4", 4): (2, [1, 1, 1, 3]),
    ("v5p:2x2x4", 2): (3, [2, 2]),
    ("v5p:2x2x4", 1): (5, [0]),
}
WANT |= {("v6e:2x4", ring): figures for (name, ring), figures in WANT.items() if name == "v5e:2x4"}


@pytest.mark.parametrize(("name", "ring"), WANT)
def test_ulysses_groups_are_compact_and_ring_neighbours_adjacent(name, ring):
    devices = slice_of(*SLICES[name])
    places = context(devices, len(devices) // ring)
    diameter, hops = WANT[name, ring]
    assert far(places[:, :, None], places[:, None]).max() == diameter
    to_next = far(places, np.roll(places, -1, axis=0))
    assert to_next.tolist() == [[hop] * (len(devices) // ring) for hop in hops]
    between_groups = [far(a[:, None], b[None]).min() for a, b in itertools.pairwise(places)]
    assert set(between_groups) <= {1}


def test_the_cores_of_a_chip_are_the_nearest():
    places = context(slice_of(*SLICES["TPU7x:2x2x2"]), 2)
    assert (places[:, 0, 1:] == places[:, 1, 1:]).all() and (places[:, :, 0] == [0, 1]).all()


def test_tensor_groups_are_inside_of_ulysses_groups_and_data_is_outermost():
    mesh = make_mesh(Degrees(data=2, context=4, tensor=2), ulysses=2, devices=slice_of(4, 4, 1)).devices
    places = np.array([d.coords for d in mesh.flat]).reshape(*mesh.shape, 3)[:, 0]
    assert (far(places[..., 0, :], places[..., 1, :]) == 1).all()
    assert (far(places[..., 0, :, :], places[..., 1, :, :]) == 1).all()
    assert (far(places[:, 0], places[:, 1]) == 2).all()


def test_a_part_of_a_slice_is_taken_in_its_order():
    devices = slice_of(2, 4, 1)[:6]
    assert list(make_mesh(Degrees(context=6), ulysses=2, devices=devices).devices.flat) == devices


@pytest.mark.parametrize("box", [(1,), (2,), (5,), (3, 3), (2, 4), (4, 1, 3), (3, 1, 2, 4), (2, 2, 2, 2), (1, 5, 1)])
def test_walk(box):
    points = walk(box)
    assert sorted(points) == list(np.ndindex(box))
    assert all(far(np.array(a), np.array(b)) == 1 for a, b in itertools.pairwise(points))
    wide = sum(size > 1 for size in box) > 1
    if len(points) <= 2 or (wide and len(points) % 2 == 0):
        assert far(np.array(points[0]), np.array(points[-1])) <= 1
