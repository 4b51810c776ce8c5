"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), data prediction; second order.

References, which agree: FlowDPMSolverMultistepScheduler of the official code and diffusers'
DPMSolverMultistepScheduler, algorithm_type dpmsolver++, solver_type midpoint, final_sigmas_type zero. The first step is
of first order, and so is the step that ends at sigma 0, where the log-SNR is infinite and the rule reduces to x = x0.
Where the first level is 1 (`dpm_flow`), the log-SNR is infinite there too, and the second step is of first order.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from maxdiffusion.denoise.schedule import Schedule, dpm_flow
from maxdiffusion.denoise.solvers.solver import Numbers, log_snr


class DPMState(NamedTuple):
    x: jax.Array
    last_x0: jax.Array  # prediction of the step before; zeros, with weight 0, in the first step


class DPMTable(NamedTuple):
    """x' = keep * x + now * x0 + last * last_x0; each (N,)."""

    sigma: Numbers
    keep: Numbers
    now: Numbers
    last: Numbers


@dataclasses.dataclass(frozen=True)
class DPMpp2M:
    """One network call a step, no corrector."""

    schedule = staticmethod(dpm_flow)

    def table(self, schedule: Schedule) -> DPMTable:
        sigmas, lam = schedule.sigmas.astype(np.float64), log_snr(schedule.sigmas)
        h = np.diff(lam)
        gain = -(1 - sigmas[1:]) * np.expm1(-h)  # weight of x0 in a first-order step
        extrapolation = np.zeros_like(h)  # 1 / (2 r0) with r0 = h_{i-1} / h_i
        with np.errstate(invalid="ignore"):  # two steps from 1 to 0: both h are infinite
            extrapolation[1:] = 0.5 * h[1:] / h[:-1]
        if sigmas[-1] == 0:
            extrapolation[-1] = 0
        return DPMTable(sigmas[:-1], sigmas[1:] / sigmas[:-1], gain * (1 + extrapolation), -gain * extrapolation)

    def init(self, x: Float[Array, "b f h w c"], keys: UInt32[Array, "b 2"] | None = None) -> DPMState:
        return DPMState(x, jnp.zeros_like(x))

    def step(self, state: DPMState, row: DPMTable, velocity: Float[Array, "b f h w c"]) -> DPMState:
        x0 = state.x - row.sigma * velocity
        return DPMState(row.keep * state.x + row.now * x0 + row.last * state.last_x0, x0)
