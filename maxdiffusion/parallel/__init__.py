"""Meshes, logical axes and the table between them."""

from maxdiffusion.parallel import axes
from maxdiffusion.parallel.rules import Placement, current, shard, use

__all__ = ["Placement", "axes", "current", "shard", "use"]
