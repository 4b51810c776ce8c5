"""The recipe of a run: solver, noise levels, the steps of each expert and their guidance scales."""

from __future__ import annotations

import dataclasses

from maxdiffusion.conventions import Levels
from maxdiffusion.denoise.experts import ExpertSteps, expert_steps
from maxdiffusion.denoise.schedule import Schedule
from maxdiffusion.denoise.solvers import SOLVERS, Solver


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Solver, schedule and experts of a run; needs no data."""

    solver: Solver
    schedule: Schedule
    experts: tuple[ExpertSteps, ...]

    @classmethod
    def of(
        cls,
        solver: str,
        steps: int,
        flow_shift: float,
        *,
        scales: tuple[float, float | None],
        boundary: float | None,
        strength: float | None = None,
        levels: Levels = "official",
    ) -> Recipe:
        """The recipe of a run.

        Args:
          solver: a key of `SOLVERS`.
          steps: denoise steps.
          flow_shift: shift of the noise levels.
          scales: guidance scales of the high-noise and of the low-noise expert.
          boundary: the high-noise expert denoises timesteps from this times 1000 up; None: there is one expert.
          strength: part of the steps that remains in video to video; None: all.
          levels: whose noise levels, see `denoise.schedule`.

        Raises:
          UserError: the schedule cannot be made, or `strength` leaves none of its steps.
        """
        schedule = SOLVERS[solver].schedule(steps, flow_shift, levels)
        if strength is not None:
            schedule = schedule.last(strength)
        return cls(SOLVERS[solver], schedule, expert_steps(schedule.timesteps, boundary, *scales))

    @property
    def guided(self) -> bool:
        """Whether any step is guided, so that negative prompts are encoded."""
        return any(expert.guided for expert in self.experts)
