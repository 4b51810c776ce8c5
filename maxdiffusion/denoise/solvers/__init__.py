"""Solvers, one file each, by the names that users write."""

from collections.abc import Mapping

from maxdiffusion.denoise.solvers.dpmpp import DPMpp2M
from maxdiffusion.denoise.solvers.euler import Euler
from maxdiffusion.denoise.solvers.renoise import Renoise
from maxdiffusion.denoise.solvers.restarted import Restarted
from maxdiffusion.denoise.solvers.solver import Solver
from maxdiffusion.denoise.solvers.unipc import UniPC

SOLVERS: Mapping[str, Solver] = {"unipc": UniPC(), "euler": Euler(), "dpmpp_2m": DPMpp2M(), "renoise": Renoise()}

__all__ = ["SOLVERS", "DPMpp2M", "Euler", "Renoise", "Restarted", "Solver", "UniPC"]
