"""A solver that begins anew within a run, without the history of the steps before."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt32

from maxdiffusion.conventions import Levels
from maxdiffusion.denoise.schedule import Schedule
from maxdiffusion.denoise.solvers.solver import Solver


@dataclasses.dataclass(frozen=True)
class Restarted:
    """`solver`, which begins anew at step `at`, from the noise level `sigma` in place of the schedule's."""

    solver: Solver
    at: int
    sigma: float

    def schedule(self, steps: int, flow_shift: float, levels: Levels = "official") -> Schedule:
        return self.solver.schedule(steps, flow_shift, levels)

    def table(self, schedule: Schedule) -> Any:
        levels = np.array([self.sigma, *schedule.sigmas[self.at + 1 :]])
        before, after = map(self.solver.table, (schedule, Schedule(levels, schedule.timesteps[self.at :])))
        return jax.tree.map(lambda a, b: np.concatenate([a[: self.at], b]), before, after)

    def init(self, x: Float[Array, "b f h w c"], keys: UInt32[Array, "b 2"] | None = None) -> Any:
        return self.solver.init(x, keys)

    def step(self, state: Any, row: Any, velocity: Float[Array, "b f h w c"]) -> Any:
        return self.solver.step(state, row, velocity)
