"""The recipe of a run: solver, noise levels, the steps of each expert and their guidance scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from maxdiffusion.conventions import Levels
from maxdiffusion.denoise import upsampling
from maxdiffusion.denoise.experts import ExpertSteps, expert_steps, half_size_first
from maxdiffusion.denoise.schedule import TRAIN_STEPS, Schedule, explicit_levels, levels_by_expert
from maxdiffusion.denoise.solvers import SOLVERS, Restarted, Solver


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Solver, schedule and experts of a run; needs no data.

    Attributes:
      solver: the sampler.
      schedule: the noise levels.
      experts: the steps of each network.
      noise_scale: of the initial noise where there is nothing but noise: sigmas[0] of explicit levels (x = sigma noise,
        as rCM starts below 1), else 1, as both references have it.
    """

    solver: Solver
    schedule: Schedule
    experts: tuple[ExpertSteps, ...]
    noise_scale: float = 1.0

    @classmethod
    def of(
        cls,
        solver: str,
        steps: tuple[int, int | None],
        flow_shifts: tuple[float, float | None],
        *,
        scales: tuple[float, float | None],
        boundary: float | None,
        boundary_step: int | None = None,
        sigmas: Sequence[float] = (),
        strength: float | None = None,
        levels: Levels = "official",
    ) -> Recipe:
        """The recipe of a run.

        Args:
          solver: a key of `SOLVERS`.
          steps: denoise steps: of the run and None, or of each expert, see `levels_by_expert`.
          flow_shifts: shift of the noise levels, and that of the low-noise expert where it has steps of its own.
          scales: guidance scales of the high-noise and of the low-noise expert.
          boundary: the high-noise expert denoises timesteps from this times 1000 up; None: see `boundary_step`.
          boundary_step: number of the high-noise expert's steps, in place of `boundary`; both None: one expert.
          sigmas: the noise levels in place of `steps` and `flow_shifts`; empty: those of the solver.
          strength: part of the steps that remains in video to video; None: all.
          levels: whose noise levels, see `denoise.schedule`.

        Raises:
          UserError: the schedule cannot be made, or `strength` leaves none of its steps.
        """
        (high, low), (flow_shift, flow_shift_2) = steps, flow_shifts
        if sigmas:
            schedule = explicit_levels(sigmas)
        elif low is not None and flow_shift_2 is not None and boundary is not None:
            schedule, boundary_step = levels_by_expert((high, low), (flow_shift, flow_shift_2), boundary), high
        else:
            schedule = SOLVERS[solver].schedule(high, flow_shift, levels)
        if strength is not None:
            whole, schedule = len(schedule), schedule.last(strength)
            if boundary_step is not None:
                boundary_step = max(0, boundary_step - (whole - len(schedule)))
        experts = expert_steps(schedule.timesteps, boundary, *scales, boundary_step)
        return cls(SOLVERS[solver], schedule, experts, float(schedule.sigmas[0]) if sigmas else 1.0)

    def half_size_first(self, steps: int) -> Recipe:
        """The recipe with the first `steps` at half height and width, see `upsampling`: fewer than all, from 1 on.

        The next step begins at a raised level, whose timestep is rounded as the others are.
        """
        sigma, timesteps = upsampling.raised(float(self.schedule.sigmas[steps])), self.schedule.timesteps.copy()
        whole = np.array_equal(timesteps, np.floor(timesteps))
        timesteps[steps] = np.floor(TRAIN_STEPS * sigma) if whole else TRAIN_STEPS * sigma
        return dataclasses.replace(
            self,
            solver=Restarted(self.solver, steps, sigma),
            schedule=Schedule(self.schedule.sigmas, timesteps),
            experts=half_size_first(self.experts, steps),
        )

    @property
    def half_steps(self) -> int:
        """How many first steps are at half height and width."""
        return max((expert.stop for expert in self.experts if expert.half), default=0)

    @property
    def guided(self) -> bool:
        """Whether any step is guided, so that negative prompts are encoded."""
        return any(expert.guided for expert in self.experts)
