import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from maxdiffusion.errors import UserError
from maxdiffusion.parallel import Degrees, axes, make_mesh, resolve


class Device:
    """What `mesh_utils` reads of a TPU device of one of several slices."""

    platform = "tpu"
    device_kind = "TPU v6e"

    def __init__(self, id, slice_index, coords):
        self.id, self.slice_index, self.coords, self.core_on_chip = id, slice_index, coords, 0
        self.process_index = slice_index


def slices(count, side=2):
    per_slice = [(x, y, 0) for y in range(side) for x in range(side)]
    return [Device(s * len(per_slice) + i, s, c) for s in range(count) for i, c in enumerate(per_slice)]


@pytest.mark.parametrize(
    ("ici", "want"),
    [
        (Degrees(context=-1), Degrees(1, 1, 8, 1)),
        (Degrees(data=2, context=-1), Degrees(2, 1, 4, 1)),
        (Degrees(data=2, fsdp=-1, tensor=2), Degrees(2, 2, 1, 2)),
        (Degrees(data=8, context=-1), Degrees(8, 1, 1, 1)),
        (Degrees(tensor=8), Degrees(1, 1, 1, 8)),
    ],
)
def test_one_degree_takes_what_is_left(ici, want):
    assert ici.filled(8) == want


@pytest.mark.parametrize(
    ("ici", "words"),
    [
        (Degrees(data=-1, context=-1), "ici_data_parallelism and ici_context_parallelism are both -1"),
        (Degrees(data=3, context=-1), "a multiple of 3 devices, but there are 8.*1, 2, 4, 8"),
        (Degrees(data=16), "data 16 needs 16 devices, but there are 8"),
        (Degrees(), "1 needs 1 devices, but there are 8.*ici_context_parallelism=-1"),
        (Degrees(data=0, context=-1), "ici_data_parallelism=0 must be 1 or more, or -1"),
        (Degrees(tensor=-2), "ici_tensor_parallelism=-2 must be 1 or more, or -1"),
    ],
)
def test_degrees_that_do_not_fit(ici, words):
    with pytest.raises(UserError, match=words):
        ici.filled(8)


def test_ulysses_groups_are_neighbours_and_later_axes_vary_fastest():
    mesh = make_mesh(Degrees(data=2, context=4), ulysses=2)
    assert mesh.axis_names == axes.MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Auto}
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert ids.shape == (2, 1, 2, 2, 1)
    assert ids[:, 0, :, :, 0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.parametrize(("ulysses", "legal"), [(3, "1 or 2 or 4"), (8, "1 or 2 or 4"), (0, "1 or 2 or 4")])
def test_ulysses_divides_the_context_of_a_slice(ulysses, legal):
    with pytest.raises(UserError, match=f"choose {legal}"):
        make_mesh(Degrees(data=2, context=4), ulysses=ulysses)


def test_one_device():
    mesh = make_mesh(Degrees(context=-1), Degrees(data=-1), devices=jax.devices()[:1])
    assert mesh.size == 1 and tuple(mesh.shape) == axes.MESH_AXES


def test_several_slices_are_outermost():
    devices = slices(2)
    assert resolve(Degrees(context=-1), Degrees(data=-1), devices) == (Degrees(context=4), Degrees(data=2))
    mesh = make_mesh(Degrees(context=-1), Degrees(data=-1), ulysses=4, devices=devices)
    assert mesh.devices.shape == (2, 1, 1, 4, 1)
    owner = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (owner[0] == owner[0].flat[0]).all() and owner[0].flat[0] != owner[1].flat[0]


def test_a_context_over_slices_is_the_outer_part_of_the_ring():
    mesh = make_mesh(Degrees(context=4), Degrees(context=2), ulysses=2, devices=slices(2))
    owner = np.vectorize(lambda device: device.slice_index)(mesh.devices)[0, 0, :, :, 0]
    assert owner.tolist() in ([[0, 0]] * 2 + [[1, 1]] * 2, [[1, 1]] * 2 + [[0, 0]] * 2)


def test_slices_that_are_not_there():
    with pytest.raises(UserError, match="dcn parallelism data 2 needs 2 slices, but there are 1"):
        make_mesh(Degrees(context=8), Degrees(data=2))
