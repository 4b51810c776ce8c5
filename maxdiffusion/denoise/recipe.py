"""What a run denoises by: solver, noise levels, and which expert takes which steps how strongly guided."""

from __future__ import annotations

import dataclasses

from maxdiffusion.denoise.schedule import Schedule
from maxdiffusion.denoise.segments import Segment, segments
from maxdiffusion.denoise.solvers import SOLVERS, Solver


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The strategies of the denoise loop before there is any data."""

    solver: Solver
    schedule: Schedule
    segments: tuple[Segment, ...]

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
    ) -> Recipe:
        """The recipe of a run.

        Args:
          solver: a key of `SOLVERS`.
          steps: denoise steps.
          flow_shift: of the noise levels.
          scales: of guidance, of the high-noise and of the low-noise expert.
          boundary: the high-noise expert takes timesteps from this times 1000 on; None: there is one expert.
          strength: part of the levels that is left where a video is changed; None: all.

        Raises:
          UserError: the schedule cannot be made, or `strength` leaves none of its steps.
        """
        schedule = SOLVERS[solver].schedule(steps, flow_shift)
        if strength is not None:
            schedule = schedule.last(strength)
        return cls(SOLVERS[solver], schedule, segments(schedule.timesteps, boundary, *scales))

    @property
    def guided(self) -> bool:
        """Whether any step is, so that negative prompts are encoded."""
        return any(segment.guided for segment in self.segments)
