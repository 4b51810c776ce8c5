"""The interface of a solver.

Every solver here is a linear multistep method in x and the predicted x0 (`renoise` adds noise), so that a schedule
enters as a few coefficients per step. They are computed once on the host in float64 (`table`); a step is then a few
multiply-adds with its row of the table. Steps run one by one or in a scan by the same code, and one compiled step
serves any schedule and any number of steps.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, UInt32

from maxdiffusion.conventions import Levels
from maxdiffusion.denoise.schedule import Schedule

Numbers = Any  # numpy in a table; in its row, inside a step, a jax array


@runtime_checkable
class Solver(Protocol):
    """A frozen value; its state is a pytree (NamedTuple) with the current latents in `.x`, in the dtype of `x`."""

    def schedule(self, steps: int, flow_shift: float, levels: Levels = "official") -> Schedule:
        """Noise levels and timesteps as the official code or diffusers sets them for this solver."""

    def table(self, schedule: Schedule) -> Any:
        """A pytree of float64 numpy arrays with leading axis N: row i holds the coefficients of step i."""

    def init(self, x: Float[Array, "b f h w c"], keys: UInt32[Array, "b 2"] | None = None) -> Any:
        """The state before the first step, at schedule.sigmas[0]; `keys` are those of a solver that draws noise."""

    def step(self, state: Any, row: Any, velocity: Float[Array, "b f h w c"]) -> Any:
        """Steps from sigmas[i] to sigmas[i + 1]; `row` is row i of the table, `velocity` the network's at state.x."""


def log_snr(sigmas: np.ndarray) -> np.ndarray:
    """Log-SNR lambda = log(alpha / sigma) with alpha = 1 - sigma, in float64; inf at sigma 0, -inf at sigma 1."""
    sigmas = sigmas.astype(np.float64)
    with np.errstate(divide="ignore"):
        return np.log1p(-sigmas) - np.log(sigmas)
