"""From a program's schedule to seconds, predicted; nothing was timed, and nothing here imports jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from maxdiffusion.hardware import links
from maxdiffusion.hardware.chips import DeviceSpeed, Generation
from maxdiffusion.planning.kernels import cycles
from maxdiffusion.planning.schedule import Choice, Collective, Done, Kernel, Loop, Schedule, Step, Work
from maxdiffusion.request.cost import Seconds

# What TPUs took, relative to the same count of the programs of others: 0.973 to 1.013 for guided steps of the 14B model
# on TPU7x-8, at most 1.086 on v6e-8 (that figure holds text and VAE as well), 1.03 and 1.04 for kernels alone. A range
# goes from the least of these to the largest, that with links half as fast as published.
CALIBRATION = (0.97, 1.09)
SLOW_LINKS = 0.5


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one call of a program.

    Attributes:
      seconds: as published figures of links and static counts give them, the range by `CALIBRATION`.
      uncounted: Pallas kernels whose time is not known and not in it.
    """

    seconds: Seconds
    uncounted: tuple[str, ...] = ()


def predict(schedule: Schedule, generation: Generation, *, branch_probability: float = 1.0) -> Prediction:
    """The time of a program on one slice.

    Args:
      schedule: of the program.
      generation: of the slice.
      branch_probability: of the slowest branch of a conditional, instead of the fastest, such as of the layers of VACE
        that have a control layer.
    """
    fast = _Clock(generation, generation.speed, branch_probability)
    speed = dataclasses.replace(
        generation.speed,
        link=SLOW_LINKS * generation.speed.link,
        in_chip=SLOW_LINKS * generation.speed.in_chip,
    )
    parts = fast.time(schedule.steps)
    slow = _Clock(generation, speed, branch_probability).time(schedule.steps)
    low, high = CALIBRATION[0] * parts.total, CALIBRATION[1] * slow.total
    return Prediction(dataclasses.replace(parts, low=low, high=high), tuple(sorted(fast.uncounted)))


class _Clock:
    """Runs through a schedule; a device computes in order, its links carry one collective after another.

    What the cores of a chip exchange does not take its links.
    """

    def __init__(self, generation: Generation, speed: DeviceSpeed, branch_probability: float) -> None:
        self.generation, self.speed, self.branch_probability = generation, speed, branch_probability
        self.uncounted: set[str] = set()

    def time(self, steps: Sequence[Step]) -> Seconds:
        parts = Seconds()
        free = {True: 0.0, False: 0.0}  # when the links are, and what joins the cores of a chip
        begun: dict[str, tuple[float, float]] = {}  # duration, end
        for step in steps:
            match step:
                case Collective():
                    duration, leaves = seconds(step, self.speed), _chips(step, self.speed) > 1
                    end = free[leaves] = max(free[leaves], parts.total) + duration
                    if step.key:
                        begun[step.key] = duration, end
                    else:
                        parts += Seconds(exposed=end - parts.total)
                case Done():
                    duration, end = begun.pop(step.key)
                    waits = max(0.0, end - parts.total)
                    parts += Seconds(exposed=waits, hidden=max(0.0, duration - waits))
                case _:
                    parts += self._work(step)
        return parts

    def _work(self, step: Work | Kernel | Loop | Choice) -> Seconds:
        hertz = 1e9 * self.generation.ghz
        match step:
            case Work():
                return Seconds(**{"linear" if step.linear else "other": step.cycles / hertz})
            case Kernel():
                count = cycles(step, self.generation)
                if count is None:
                    self.uncounted.add(step.name)
                return Seconds(attention=(count or 0.0) / hertz)
            case Loop():
                return self.time(step.body) * step.times
            case Choice():
                ways = sorted((self.time(branch) for branch in step.branches), key=lambda way: way.total)
                return ways[-1] * self.branch_probability + ways[0] * (1 - self.branch_probability)


_MODELS: dict[str, tuple[int, Callable[[int, int, int, DeviceSpeed], float]]] = {
    "all-to-all": (1, links.all_to_all),
    "all-gather": (1, links.all_gather),
    "reduce-scatter": (1, links.all_gather),
    "all-reduce": (2, links.all_gather),
    "collective-permute": (1, links.permute),
}


def seconds(collective: Collective, speed: DeviceSpeed) -> float:
    """Modelled time of a collective within a slice, were it alone."""
    times, model = _MODELS[collective.kind]
    return times * model(collective.size, len(collective.group), _chips(collective, speed), speed)


def _chips(collective: Collective, speed: DeviceSpeed) -> int:
    return len({number // speed.cores for number in collective.group})
