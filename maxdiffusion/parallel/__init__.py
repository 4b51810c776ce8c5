"""The device mesh, logical axes and the rules that map them onto it."""

from maxdiffusion.parallel import axes
from maxdiffusion.parallel.compiler import compiler_options, jit, platform
from maxdiffusion.parallel.mesh import Degrees, Devices, make_mesh, resolve
from maxdiffusion.parallel.placement import (
    TILE_ROWS,
    Placement,
    current,
    data_degree,
    degree,
    gathered,
    like,
    per_device,
    put,
    shard,
    token_multiple,
    use,
)
from maxdiffusion.parallel.rules import rules_for

__all__ = [
    "TILE_ROWS",
    "Degrees",
    "Devices",
    "Placement",
    "axes",
    "compiler_options",
    "current",
    "data_degree",
    "degree",
    "gathered",
    "jit",
    "like",
    "make_mesh",
    "per_device",
    "platform",
    "put",
    "resolve",
    "rules_for",
    "shard",
    "token_multiple",
    "use",
]
