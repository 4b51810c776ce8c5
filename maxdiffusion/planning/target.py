"""The devices that a plan is for. Imports no jax."""

from __future__ import annotations

import dataclasses
import os
import platform

from maxdiffusion.errors import UserError
from maxdiffusion.hardware.chips import Slice, slice_of
from maxdiffusion.planning.pool import Pool
from maxdiffusion.runtime.hosts import metadata


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices of a plan.

    Attributes:
      slice: of TPUs; None is this machine's own devices.
      platform: as jax calls it.
      kind: `device_kind`.
      devices: how many.
      gib: memory of one that a program may use.
      chips: how many are rented.
    """

    slice: Slice | None
    platform: str
    kind: str
    devices: int
    gib: float
    chips: int

    def __str__(self) -> str:
        if self.slice:
            return f"{self.slice.topology} ({self.devices} devices of {self.gib:g} GiB on {self.chips} chips)"
        return f"this machine ({self.devices} x {self.kind}, {self.gib:.1f} GiB each)"


def slice_named(name: str) -> Slice | None:
    """The slice that `plan` names; None is this machine.

    Raises:
      UserError: there is none.
    """
    return None if name == "here" else slice_of(_own_slice() if name == "auto" else name)


def identity(tpu: Slice | None) -> object:
    """What a plan's devices follow from, known without a look at them."""
    if tpu:
        return tpu.topology
    named = ("JAX_", "XLA_", "CUDA_", "TPU_")
    return platform.node(), sorted(each for each in os.environ.items() if each[0].startswith(named))


def devices_of(tpu: Slice | None, pool: Pool) -> Target:
    """The devices of that slice, or this machine's.

    Raises:
      UserError: they do not start.
    """
    if tpu:
        return Target(tpu, "tpu", tpu.generation.kind, tpu.devices, tpu.generation.gib, tpu.chips)
    from maxdiffusion.planning import worker

    here = pool.do(worker.devices)
    if here is None:
        raise UserError("This machine's devices did not answer within plan_minutes; write a larger one.")
    return Target(None, chips=here["devices"], **here)


def _own_slice() -> str:
    """The slice that this TPU VM is of, without a look at its devices, which another process may hold.

    Raises:
      UserError: this is none.
    """
    if name := os.environ.get("TPU_ACCELERATOR_TYPE") or metadata("accelerator-type"):
        return name
    raise UserError(
        "plan=auto finds no TPU here; name a slice, such as plan=v6e-8, or write plan=here for this machine's own "
        "devices."
    )
