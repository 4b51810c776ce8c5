"""Euler's method on the flow ODE dx/dsigma = velocity; first order.

Reference: diffusers FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt32

from maxdiffusion.denoise.schedule import Schedule, euler_flow
from maxdiffusion.denoise.solvers.solver import Numbers


class EulerState(NamedTuple):
    x: jax.Array


@dataclasses.dataclass(frozen=True)
class Euler:
    """The table is the step's length sigma_{i+1} - sigma_i, (N,)."""

    schedule = staticmethod(euler_flow)

    def table(self, schedule: Schedule) -> np.ndarray:
        return np.diff(schedule.sigmas.astype(np.float64))

    def init(self, x: Float[Array, "b f h w c"], keys: UInt32[Array, "b 2"] | None = None) -> EulerState:
        return EulerState(x)

    def step(self, state: EulerState, row: Numbers, velocity: Float[Array, "b f h w c"]) -> EulerState:
        return EulerState(state.x + row * velocity)
