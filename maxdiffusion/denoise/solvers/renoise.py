"""Renoise: predict x0, then add fresh noise up to the next level; the sampler of few-step models distilled by DMD or
consistency (Song et al. 2023, arXiv 2303.01469, algorithm 1; Yin et al. 2024, arXiv 2405.14867).

Reference: diffusers FlowMatchLCMScheduler. The noise of a step follows from the video's seed and the number of the step
(`denoise.noise.step_noise`): the same on every mesh, in every batch, and in a run that goes on after that step.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from maxdiffusion.denoise.noise import step_noise
from maxdiffusion.denoise.schedule import Schedule, euler_flow
from maxdiffusion.denoise.solvers.solver import Numbers


class RenoiseState(NamedTuple):
    x: jax.Array
    keys: jax.Array | None  # uint32 (b, 2), see `step_keys`


class RenoiseTable(NamedTuple):
    """x' = (1 - next) * x0 + next * noise; each (N,)."""

    step: Numbers
    sigma: Numbers
    next: Numbers


@dataclasses.dataclass(frozen=True)
class Renoise:
    """One network call a step; the last step, to sigma 0, returns x0."""

    schedule = staticmethod(euler_flow)

    def table(self, schedule: Schedule) -> RenoiseTable:
        sigmas = schedule.sigmas.astype(np.float64)
        return RenoiseTable(np.arange(len(schedule), dtype=np.float64), sigmas[:-1], sigmas[1:])

    def init(self, x: Float[Array, "b f h w c"], keys: UInt32[Array, "b 2"] | None = None) -> RenoiseState:
        """Without `keys` the state is abstract: no step can be made from it."""
        return RenoiseState(x, keys)

    def step(self, state: RenoiseState, row: RenoiseTable, velocity: Float[Array, "b f h w c"]) -> RenoiseState:
        if state.keys is None:
            raise ValueError("renoise draws noise in every step: its state needs the videos' keys")
        _, f, h, w, c = state.x.shape
        noise = step_noise(state.keys, jnp.int32(row.step), (f, h, w, c))
        x0 = state.x - row.sigma * velocity
        return RenoiseState((1 - row.next) * x0 + row.next * noise, state.keys)
