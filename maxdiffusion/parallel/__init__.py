"""The device mesh, logical axes and the rules that map them onto it."""

from maxdiffusion.parallel import axes
from maxdiffusion.parallel.compiler import compiler_options, jit, platform
from maxdiffusion.parallel.mesh import Degrees, Devices, make_mesh, resolve
from maxdiffusion.parallel.placement import (
    Placement,
    current,
    data_degree,
    gathered,
    like,
    put,
    sequence_degree,
    shard,
    use,
)
from maxdiffusion.parallel.rules import rules_for

__all__ = [
    "Degrees",
    "Devices",
    "Placement",
    "axes",
    "compiler_options",
    "current",
    "data_degree",
    "gathered",
    "jit",
    "like",
    "make_mesh",
    "platform",
    "put",
    "resolve",
    "rules_for",
    "sequence_degree",
    "shard",
    "use",
]
