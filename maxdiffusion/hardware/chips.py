"""TPU generations (names, topologies, memory, speed) and their slices. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from maxdiffusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class DeviceSpeed:
    """Rates of one device and of its links to others.

    Attributes:
      peak: FLOP/s of matrix products.
      ceiling: FLOP/s of matrix products that contract over 128, as the logits of attention do: half of `peak` where a
        matrix unit is 256 wide.
      attention: FLOP/s of its attention kernel on a ring hop of the 14B model, static (see `block_sizes.FLASH`).
      memory: bytes/s of its memory.
      link: bytes/s of a link to a neighbouring chip, one way.
      merging: bytes/s of `attention.merge`: on a TPU 333 bytes per cycle of a tensor core, fitted; on others modelled
        as a quarter of `memory`.
      cores: devices that share a chip and its links.
      in_chip: bytes/s between the cores of a chip, one way.
      sides: dimensions of the grid of chips.
      network: bytes/s of its share of the network between slices, one way.
    """

    peak: float
    ceiling: float
    attention: float
    memory: float
    link: float
    merging: float
    cores: int = 1
    in_chip: float = 0.0
    sides: int = 2
    network: float = 6e9


@dataclasses.dataclass(frozen=True)
class Generation:
    """A TPU generation, figures per jax device.

    Attributes:
      name: in topologies, such as v6e:2x4.
      kind: `device_kind` of its devices.
      accelerator: libtpu's name in TPU_ACCELERATOR_TYPE, before the number.
      numbered: tensor cores of a chip, which the number in such a name, or in v5p-8, counts.
      tensor_cores: of a device; the grid of a kernel is split among them.
      gib: memory that the compiler lets a program use.
      ghz: clock of the compiler's cycles, calibrated on matrix products.
      speed: of a device.
    """

    name: str
    kind: str
    accelerator: str
    numbered: int
    tensor_cores: int
    gib: float
    ghz: float
    speed: DeviceSpeed


# Peak, memory and links as published in Cloud TPU's documentation (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e,
# tpu7x); of links the figure of a chip divided by its ports: v5e 1600 Gbit/s by 4, v6e 800 GB/s both ways by 4, v5p
# 4800 Gbit/s by 6, TPU7x 1200 GB/s both ways by 6. Between the cores of a TPU7x, and between slices (documented: 25 to
# 100 Gbit/s a chip), the figures are modelled. The memory is what libtpu 0.0.42 names when a program needs more.
_V5E = DeviceSpeed(197e12, 197e12, 189e12, 819e9, 50e9, 499.5e9)
_V6E = DeviceSpeed(918e12, 612e12, 570e12, 1640e9, 100e9, 582.75e9)
_V5P = DeviceSpeed(459e12, 459e12, 441e12, 2765e9, 100e9, 1165.5e9, sides=3)
_TPU7X = DeviceSpeed(1153.5e12, 769e12, 710e12, 3690e9, 100e9, 732.6e9, cores=2, in_chip=600e9, sides=3)
_GENERATIONS = (
    Generation("v5e", "TPU v5 lite", "v5litepod", 1, 1, 15.75, 1.5, _V5E),
    Generation("v6e", "TPU v6 lite", "v6e", 1, 1, 31.25, 1.75, _V6E),
    Generation("v5p", "TPU v5", "v5p", 2, 2, 95.74, 1.75, _V5P),
    Generation("TPU7x", "TPU7x", "tpu7x", 2, 1, 94.75, 2.2, _TPU7X),
)
GENERATIONS: Mapping[str, Generation] = MappingProxyType({each.name: each for each in _GENERATIONS})
KINDS: Mapping[str, Generation] = MappingProxyType({each.kind: each for each in _GENERATIONS})

# Other names in use.
_ALIASES = {"v7x": "TPU7x", "tpu7x": "TPU7x", "v5litepod": "v5e"}

# The slices that Cloud TPU offers, up to 512 chips, and that libtpu describes.
_GRIDS = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """TPU chips joined by links.

    Attributes:
      generation: of the chips.
      topology: what libtpu calls it, such as v6e:2x4.
      devices: number of its jax devices.
    """

    generation: Generation
    topology: str
    devices: int

    @property
    def chips(self) -> int:
        """Number of chips rented."""
        return self.devices // self.generation.speed.cores

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which libtpu describes the slice without a TPU; set before jax starts."""
        return {
            "TPU_SKIP_MDS_QUERY": "1",
            "JAX_PLATFORMS": "cpu",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": f"{self.generation.accelerator}-{self.chips * self.generation.numbered}",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_LOG_DIR": "disabled",  # it would fill the temporary directory
        }

    def describe(self) -> list[Any]:
        """Abstract jax devices, by libtpu, in a process with this `environment`."""
        from jax.experimental import topologies

        # By default a host has 2x2 chips.
        host = {"chips_per_host_bounds": [1, 1, 1]} if self.chips == 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=self.topology, **host).devices)


def slice_of(name: str) -> Slice:
    """The slice of a name such as v6e-8 or v7x-16 (the number counts tensor cores), or of a topology such as v6e:4x4.

    Raises:
      UserError: no slice has that name; lists those that exist.
    """
    parts = re.fullmatch(r"(\w+)([-:])([\dx]+)", name)
    generation = GENERATIONS.get(_ALIASES.get(parts[1], parts[1])) if parts else None
    if not parts or not generation:
        raise UserError(
            f"{name!r} is not a TPU slice; choose one such as v5e-8, v5p-8, v6e-8 or v7x-8, or a topology of "
            f"{', '.join(GENERATIONS)} such as v6e:4x4 or v5p:2x2x4."
        )
    grids = {grid: math.prod(map(int, grid.split("x"))) for grid in _GRIDS[generation.speed.sides]}
    slices = {
        grid: Slice(generation, f"{generation.name}:{grid}", chips * generation.speed.cores)
        for grid, chips in grids.items()
    }
    if parts[2] == ":":
        if parts[3] in slices:
            return slices[parts[3]]
        legal = ", ".join(slice.topology for slice in slices.values())
        raise UserError(f"{name} is not a topology of {generation.name}; choose one of {legal}.")
    by_number = {str(slice.chips * generation.numbered): slice for slice in slices.values()}
    if parts[3] in by_number:
        return by_number[parts[3]]
    unit = "the number counts cores, two on a chip; " if generation.numbered > 1 else ""
    legal = ", ".join(f"{parts[1]}-{number}" for number in by_number)
    raise UserError(f"There is no slice {name}: {unit}choose one of {legal}.")
