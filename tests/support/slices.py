"""TPU slices as devices with coordinates, and the order that a mesh gives them."""

import dataclasses
import random

import numpy as np

from maxdiffusion.parallel import Degrees, make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a TPU device tells of its place."""

    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"


def slice_of(x, y, z, cores=1):
    """The devices of one slice, in no order."""
    devices = [Chip((a, b, c), core) for a, b, c, core in np.ndindex(x, y, z, cores)]
    random.Random(0).shuffle(devices)
    return devices


SLICES = {
    "v5e:2x4": (2, 4, 1),
    "v6e:2x4": (2, 4, 1),
    "v5p:2x2x2": (2, 2, 2),
    "TPU7x:2x2x2": (2, 2, 2, 2),
    "v6e:4x4": (4, 4, 1),
    "v5p:2x2x4": (2, 2, 4),
}


def context(devices, ulysses):
    """Coordinates (ring, ulysses, (core, x, y, z)) of the context axis over all devices."""
    mesh = make_mesh(Degrees(context=len(devices)), ulysses=ulysses, devices=devices)
    assert {device for device in mesh.devices.flat} == set(devices)
    return np.array([[(d.core_on_chip, *d.coords) for d in group] for group in mesh.devices[0, 0, :, :, 0]])
