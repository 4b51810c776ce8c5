"""The device mesh with named axes, made once at startup."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes
from maxdiffusion.parallel.topology import arrange

FILL = -1

Devices = Sequence[Any]  # jax.Device, or a description of one (of a topology that programs are only compiled for)


@dataclasses.dataclass(frozen=True)
class Degrees:
    """Degrees of parallelism; at most one is -1, which takes all devices that are left.

    There are two sets: inside a slice (ici) and over slices (dcn). The fields are named like the config keys:
    `Degrees(data=2, context=-1)` is `ici_data_parallelism=2 ici_context_parallelism=-1`.
    """

    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def filled(self, devices: int, kind: str = "ici") -> Degrees:
        """Replaces -1 so that the product of the degrees is `devices`.

        Raises:
          UserError: two -1, a degree below 1, or a product that is not the number of devices.
        """
        given = dataclasses.asdict(self)
        key = f"{kind}_{{}}_parallelism"
        free = [name for name, degree in given.items() if degree == FILL]
        if len(free) > 1:
            raise UserError(
                f"{' and '.join(key.format(n) for n in free)} are both -1; only one can take the devices left over, "
                "give the others a number."
            )
        for name, degree in given.items():
            if degree < 1 and degree != FILL:
                raise UserError(f"{key.format(name)}={degree} must be 1 or more, or -1 for all that are left.")
        fixed = math.prod(degree for degree in given.values() if degree != FILL)
        unit = "devices" if kind == "ici" else "slices"
        shown = " x ".join(f"{name} {degree}" for name, degree in given.items() if degree not in (1, FILL)) or "1"
        if free and devices % fixed == 0:
            return dataclasses.replace(self, **{free[0]: devices // fixed})
        if not free and fixed == devices:
            return self
        divisors = ", ".join(str(d) for d in range(1, devices + 1) if devices % d == 0)
        raise UserError(
            f"{kind} parallelism {shown} needs {'a multiple of ' if free else ''}{fixed} {unit}, but there are "
            f"{devices}; set {key.format(free[0] if free else 'context')}=-1 and let the others multiply to one of "
            f"{divisors}."
        )


def _slice(device: Any) -> int:
    """The index of the device's slice (a group joined by fast links); 0 on platforms without slices."""
    return getattr(device, "slice_index", 0)


def resolve(ici: Degrees, dcn: Degrees, devices: Devices) -> tuple[Degrees, Degrees]:
    """Replaces the -1 in both sets of degrees for these devices.

    `ici.context * dcn.context` is the context degree of the attention plan.
    """
    slices = len({_slice(device) for device in devices})
    return ici.filled(len(devices) // slices, "ici"), dcn.filled(slices, "dcn")


def make_mesh(ici: Degrees, dcn: Degrees = Degrees(), *, ulysses: int = 1, devices: Devices | None = None) -> Mesh:
    """The mesh (data, fsdp, ring, ulysses, tensor) over these devices (all by default), with Auto axis types.

    The context axis is split into ring x ulysses. The devices of a Ulysses group (and of a tensor group inside it) are
    neighbours, and rings connect the groups (see `topology.arrange`); slices are the outermost part of each axis.

    Raises:
      UserError: the degrees do not multiply to the devices, or `ulysses` does not divide the context of a slice.
    """
    devices = jax.devices() if devices is None else devices
    ici, dcn = resolve(ici, dcn, devices)
    if ulysses < 1 or ici.context % ulysses:
        legal = " or ".join(str(d) for d in range(1, ici.context + 1) if ici.context % d == 0)
        raise UserError(
            f"ulysses_shards={ulysses} does not divide the {ici.context} context devices of a slice; choose {legal}."
        )
    inner = (ici.data, ici.fsdp, ici.context // ulysses, ulysses, ici.tensor)
    outer = (dcn.data, dcn.fsdp, dcn.context, 1, dcn.tensor)
    by_slice = itertools.groupby(sorted(devices, key=_slice), key=_slice)
    slices = np.stack([arrange(list(group), inner) for _, group in by_slice]).reshape(*outer, *inner)
    # From (dcn axes, ici axes) to (dcn, ici) of each axis.
    grid = slices.transpose(np.arange(10).reshape(2, 5).T.ravel()).reshape(np.multiply(outer, inner))
    return Mesh(grid, axes.MESH_AXES, axis_types=(AxisType.Auto,) * len(axes.MESH_AXES))
