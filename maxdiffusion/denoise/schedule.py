"""Noise levels and timesteps of a run, as each solver's reference sets them.

Flow matching (Lipman et al. 2022; Liu et al. 2022): x_sigma = (1 - sigma) x_0 + sigma noise, velocity = noise - x_0.
The flow shift s moves the levels towards noise: sigma -> s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, eq. 23).

A level is a point of the ODE and the timestep the network's input there. The official code (wan/utils/fm_solvers*.py)
and diffusers 0.42.1 set both for N steps, u being evenly spaced and the last level 0:

| schedule | official | diffusers | timestep |
|---|---|---|---|
| `unipc_flow` | shift(u), u from 0.999 to 0 | shift(u), u from 1 to 0.001; first 1 - 1e-6 | floor(1000 sigma) |
| `dpm_flow` | shift(u), u from 1 to 0 | shift(u), u from 0.999 to 0 | floor(1000 sigma) |
| `euler_flow` | shift(u), u from 1 to 0 (Lightning) | shift(u), u from 1 to shift(0.001), the N-th | 1000 sigma |
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from maxdiffusion.conventions import Levels
from maxdiffusion.errors import UserError

TRAIN_STEPS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels and timesteps of a run.

    Attributes:
      sigmas: float32 (N+1,), strictly falling within [0, 1]; step i goes from sigmas[i] to sigmas[i + 1].
      timesteps: float32 (N,), the network's input at step i, in 0..1000.

    Raises:
      UserError: the levels do not fall strictly (in fp32), so that a step would have no length.
    """

    sigmas: np.ndarray
    timesteps: np.ndarray

    def __post_init__(self):
        sigmas, timesteps = (np.asarray(a, np.float32) for a in (self.sigmas, self.timesteps))
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "timesteps", timesteps)
        if len(timesteps) < 1 or sigmas.shape != (len(timesteps) + 1,):
            raise ValueError(f"N+1 sigmas and N timesteps expected, got {sigmas.shape} and {timesteps.shape}")
        if not (np.all(np.diff(sigmas) < 0) and sigmas[0] <= 1 and sigmas[-1] >= 0):
            raise UserError(
                f"The {len(timesteps)} noise levels do not fall strictly from 1 to 0; "
                "use a smaller flow_shift or fewer num_inference_steps."
            )

    def __len__(self) -> int:
        return len(self.timesteps)

    def last(self, strength: float) -> Schedule:
        """The last steps, from noise level `strength` (0..1) on: video to video (Meng et al. 2022, SDEdit).

        Reference: `get_timesteps` of diffusers' WanVideoToVideoPipeline.

        Raises:
          UserError: no step is left.
        """
        left = min(int(len(self) * strength), len(self))
        if not left:
            raise UserError(
                f"strength={strength} of {len(self)} steps leaves none; it must be at least "
                f"{math.ceil(1000 / len(self)) / 1000}, or more num_inference_steps."
            )
        return Schedule(self.sigmas[len(self) - left :], self.timesteps[len(self) - left :])


Sigmas = TypeVar("Sigmas", float, np.ndarray)


def shift_sigmas(sigmas: Sigmas, flow_shift: float) -> Sigmas:
    return flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)


def unipc_flow(steps: int, flow_shift: float, levels: Levels = "official") -> Schedule:
    """As FlowUniPCMultistepScheduler, or diffusers' UniPCMultistepScheduler(use_flow_sigmas=True).

    The first level stays below 1, where log(1 - sigma) is finite.

    Raises:
      UserError: `steps` or `flow_shift` is not positive, or see `Schedule`.
    """
    _check(steps, flow_shift)
    if levels == "official":
        return _shifted(np.linspace(float(np.float32(0.999)), 0, steps + 1), flow_shift)
    return _shifted(np.linspace(1, 1 / TRAIN_STEPS, steps + 1), flow_shift, highest=1 - 1e-6)


def dpm_flow(steps: int, flow_shift: float, levels: Levels = "official") -> Schedule:
    """As get_sampling_sigmas, or diffusers' DPMSolverMultistepScheduler(use_flow_sigmas=True).

    Raises:
      UserError: as `unipc_flow`.
    """
    _check(steps, flow_shift)
    if levels == "official":
        return _shifted(np.linspace(1, 0, steps + 1), flow_shift)
    return _shifted(1 - np.linspace(1, 1 / TRAIN_STEPS, steps + 1)[::-1], flow_shift)


def euler_flow(steps: int, flow_shift: float, levels: Levels = "official") -> Schedule:
    """As Wan2.2-Lightning, or diffusers' FlowMatchEulerDiscreteScheduler(shift=flow_shift).

    The former are the levels of models distilled to N steps, which diffusers has as
    set_timesteps(sigmas=[1, 1 - 1/N, ..., 1/N]).

    Raises:
      UserError: as `unipc_flow`.
    """
    _check(steps, flow_shift)
    if levels == "official":
        sigmas = _between(1.0, 0.0, steps, flow_shift)
        return Schedule(np.append(sigmas, 0), TRAIN_STEPS * sigmas)
    lowest = shift_sigmas(1 / TRAIN_STEPS, flow_shift)
    sigmas = shift_sigmas(np.linspace(1, lowest, steps), flow_shift).astype(np.float32)
    return Schedule(np.append(sigmas, 0), TRAIN_STEPS * sigmas)


def _shifted(u: np.ndarray, flow_shift: float, highest: float = 1.0) -> Schedule:
    """The levels u, float64 (N + 1,), shifted and at most `highest`, with 0 in place of the last."""
    sigmas = np.minimum(shift_sigmas(u[:-1], flow_shift), highest)
    return Schedule(np.append(sigmas, 0), np.floor(TRAIN_STEPS * sigmas))


def explicit_levels(sigmas: Sequence[float]) -> Schedule:
    """These noise levels, then 0; timestep 1000 sigma.

    Raises:
      UserError: a level is not in (0, 1], or not below the one before it (in fp32).
    """
    for sigma in sigmas:
        if not 0 < sigma <= 1:
            raise UserError(
                f"sigmas has the level {sigma:g}; levels lie above 0 and up to 1, and 0 is added at the end."
            )
    levels = np.array(sigmas, np.float64)
    for before, sigma in itertools.pairwise(levels.astype(np.float32).tolist()):
        if sigma >= before:
            raise UserError(
                f"sigmas must fall, but {before:g} is followed by {sigma:g}; sort them from noise to video."
            )
    return Schedule(np.append(levels, 0), TRAIN_STEPS * levels)


def levels_by_expert(steps: tuple[int, int], flow_shifts: tuple[float, float], boundary_ratio: float) -> Schedule:
    """The high-noise expert's levels from 1 down to the boundary, then the low-noise expert's from there to 0.

    Each expert's levels are its own shifted grid between its two ends: sigma_i = shift(u_i) with u_i uniform, u being
    the level before the shift. The last high-noise step ends at the boundary, where the first low-noise step starts.
    Timestep 1000 sigma.

    Raises:
      UserError: as `unipc_flow`.
      ValueError: the boundary is not between 0 and 1.
    """
    if not 0 < boundary_ratio < 1:
        raise ValueError(f"a boundary between 0 and 1 expected, got {boundary_ratio}")
    high = _between(1.0, boundary_ratio, steps[0], flow_shifts[0])
    low = _between(boundary_ratio, 0.0, steps[1], flow_shifts[1])
    sigmas = np.concatenate([high, low])
    return Schedule(np.append(sigmas, 0), TRAIN_STEPS * sigmas)


def _between(first: float, last: float, steps: int, flow_shift: float) -> np.ndarray:
    """That many levels from `first` on, without `last`: evenly spaced before the shift."""
    _check(steps, flow_shift)
    ends = [shift_sigmas(sigma, 1 / flow_shift) for sigma in (first, last)]
    return shift_sigmas(np.linspace(ends[0], ends[1], steps + 1)[:-1], flow_shift)


def _check(steps: int, flow_shift: float) -> None:
    if steps < 1:
        raise UserError(f"num_inference_steps={steps} makes no video; it must be at least 1.")
    if not flow_shift > 0:
        raise UserError(f"flow_shift={flow_shift} must be positive; 1 leaves the noise levels as they are.")
