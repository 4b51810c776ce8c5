"""Predicts seconds of a compiled program from its schedule; nothing was timed. Imports no jax.

A program's text states no cycles of Pallas kernels; they follow from `FLASH` and `ROWS`. A grid step of
`kernels.flash`, however long the sequence, costs a start and so much for each tile of 256 queries by 256 keys. Static:
waits for memory are left out, which came to 3 to 4 % where such kernels were timed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from maxdiffusion.hardware import links, quantization
from maxdiffusion.hardware.chips import DeviceSpeed, Generation
from maxdiffusion.planning.schedule import Choice, Collective, Copy, Done, Kernel, Loop, Step, Work
from maxdiffusion.request.cost import Seconds

# Time measured on TPUs over this count, programs of other projects: 0.973 to 1.013 for guided steps of the 14B model
# on TPU7x-8, at most 1.086 on v6e-8 (that figure holds text and VAE as well), 1.03 and 1.04 for kernels alone. A range
# goes from the least of these to the largest, that with links half as fast as published.
CALIBRATION = (0.97, 1.09)
SLOW_LINKS = 0.5


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Cycles of a grid step of `kernels.flash` in bf16, at a head dim of 128, on one tensor core.

    Attributes:
      start: of every step.
      bound: of a tile, where a bound takes the place of the maximum.
      running: of a tile with a running maximum.
      once: of the first and the last step of a block of queries, for 256 of them.
      merge: more in the last step of a hop that is merged into the result of those before, for 256 queries.
      width: queries that a product takes; it takes as long for fewer.
    """

    start: float
    bound: float
    running: float
    once: float
    merge: float
    width: int


# Counted by `scripts/tpu.py kernels` in the schedules of `kernels.flash` alone, with the default blocks.
FLASH: Mapping[str, Cycles] = MappingProxyType(
    {
        "v5e": Cycles(835.0, 258.5, 297.5, 127.7, 80.6, 128),
        "v6e": Cycles(645.0, 100.6, 109.7, 73.8, 58.8, 256),
        "v5p": Cycles(903.0, 258.5, 296.9, 133.2, 82.4, 128),
        "TPU7x": Cycles(791.0, 100.7, 115.8, 77.4, 60.8, 256),
    }
)
# Cycles of 1,024 elements in `kernels.rows`, by the kernel's name: what `scripts/tpu.py kernels` counts for TPU7x. v6e
# takes as many; v5e and v5p up to half as many again, but their memory takes longer. Swapping axes waits for memory.
ROWS: Mapping[str, float] = MappingProxyType(
    {
        "layer_norm": 2.7,
        "layer_norm_scaled": 4.6,
        "split": 0.7,
        "rms_norm": 1.8,
        "rotate": 3.7,
        "gelu_scaled": 4.5,
        "join": 0.7,
        "join_scaled": 2.6,
    }
)
FP32 = 6  # passes of a product
_BYTES = {"f32": 4, "bf16": 2}
OTHERS = 0.5  # of the ceiling: what splash kernels with segments and statistics reach, 312 of 612 TF/s on v6e
TILE = 256


def cycles(kernel: Kernel, generation: Generation, *, running: bool = False) -> float | None:
    """Cycles of a call of an attention kernel; None for any other kernel.

    Args:
      kernel: one of `kernels.flash`, whose name tells its blocks, or with splash in its name.
      generation: what it runs on.
      running: whether the maximum is a running one everywhere, instead of nowhere.
    """
    arrays = [array for array in kernel.operands if len(array[1]) >= 3 and array[1][-1] % 64 == 0]
    if len(arrays) < 3:
        return None
    (dtype, q), (_, k) = arrays[:2]
    rows, keys, dim = math.prod(q[:-1]), k[-2], q[-1]
    blocks = re.fullmatch(r"flash_attention_(\d+)_(\d+)", kernel.name)
    if not blocks:
        per_cycle = OTHERS * generation.speed.ceiling / (generation.ghz * 1e9)
        return 4 * rows * keys * dim / per_cycle if "splash" in kernel.name else None
    block_q, block_kv = int(blocks[1]), int(blocks[2])
    cost = FLASH[generation.name]
    narrow = quantization.ATTENTION.get(generation.kind, 1.0) if dtype.startswith("f8") else 1.0
    tiles = -(-block_q // cost.width) * cost.width * math.ceil(keys / TILE) / TILE
    each = math.ceil(keys / block_kv) * cost.start + tiles * narrow * (cost.running if running else cost.bound)
    blocks_q = math.prod(q[:-2]) * math.ceil(q[-2] / block_q)
    merged = any(array[1] == q for array in arrays[3:])
    total = blocks_q * (each + (cost.once + cost.merge * merged) * block_q / TILE)
    return total * (FP32 if dtype == "f32" else 1) * math.ceil(dim / 128) / generation.tensor_cores


class Prediction(NamedTuple):
    """Predicted time of one call of a program.

    Attributes:
      seconds: by static counts and published figures of links, the range by `CALIBRATION`.
      uncounted: names of Pallas kernels of unknown time, which is left out.
    """

    seconds: Seconds
    uncounted: tuple[str, ...]


def predict(steps: Sequence[Step], generation: Generation, *, branch_probability: float = 1.0) -> Prediction:
    """The time of a program on one slice.

    Args:
      steps: of the program.
      generation: of the slice.
      branch_probability: probability of the slowest branch of a conditional instead of the fastest, such as the share
        of the layers of VACE that have a control layer.
    """
    speed, uncounted = generation.speed, set[str]()
    slowed = dataclasses.replace(speed, link=SLOW_LINKS * speed.link, in_chip=SLOW_LINKS * speed.in_chip)
    parts, slow = (
        _time(steps, dataclasses.replace(generation, speed=each), branch_probability, uncounted)
        for each in (speed, slowed)
    )
    found = dataclasses.replace(parts, low=CALIBRATION[0] * parts.total, high=CALIBRATION[1] * slow.total)
    return Prediction(found, tuple(sorted(uncounted)))


def _time(steps: Sequence[Step], generation: Generation, branch_probability: float, uncounted: set[str]) -> Seconds:
    """Runs through the steps; a device computes in order, its links carry one collective after another.

    Collectives between the cores of a chip do not occupy its links. Adds to `uncounted`.
    """
    parts, speed, hertz = Seconds(), generation.speed, 1e9 * generation.ghz
    free = {True: 0.0, False: 0.0}  # time from which the links of the chip, and those between its cores, are free
    begun: dict[str, tuple[float, float]] = {}  # duration, end
    for step in steps:
        match step:
            case Collective():
                chips = len({number // speed.cores for number in step.group})
                times, model = _MODELS[step.kind]
                duration = times * model(step.size, len(step.group), chips, speed)
                end = free[chips > 1] = max(free[chips > 1], parts.total) + duration
                if step.key:
                    begun[step.key] = duration, end
                else:
                    parts += Seconds(exposed=end - parts.total)
            case Done():
                duration, end = begun.pop(step.key)
                waits = max(0.0, end - parts.total)
                parts += Seconds(exposed=waits, hidden=max(0.0, duration - waits))
            case Work():
                parts += Seconds(**{"linear" if step.linear else "other": step.cycles / hertz})
            case Copy():
                parts += Seconds(other=2 * step.size / speed.memory)
            case Kernel() if step.name.startswith("bounding_ball"):  # two passes over the keys
                dtype, keys = step.operands[1]
                parts += Seconds(other=2 * math.prod(keys) * _BYTES.get(dtype, 1) / speed.memory)
            case Kernel() if step.name.startswith("rows_"):  # reads and writes once
                kernel, (dtype, rows) = step.name.removeprefix("rows_"), step.operands[0]
                written = 1 if kernel.endswith("_scaled") else _BYTES.get(dtype, 1)
                moved = math.prod(rows) * (_BYTES.get(dtype, 1) + written) / speed.memory
                counted = math.prod(rows) / 1024 * ROWS.get(kernel, 0.0) / generation.tensor_cores / hertz
                parts += Seconds(other=max(moved, counted))
            case Kernel():
                count = cycles(step, generation)
                if count is None:
                    uncounted.add(step.name)
                parts += Seconds(attention=(count or 0.0) / hertz)
            case Loop():
                parts += _time(step.body, generation, branch_probability, uncounted) * step.times
            case Choice():
                ways = [_time(branch, generation, branch_probability, uncounted) for branch in step.branches]
                ways.sort(key=lambda way: way.total)
                parts += ways[-1] * branch_probability + ways[0] * (1 - branch_probability)
    return parts


_MODELS: dict[str, tuple[int, Callable[[int, int, int, DeviceSpeed], float]]] = {
    "all-to-all": (1, links.all_to_all),
    "all-gather": (1, links.all_gather),
    "reduce-scatter": (1, links.all_gather),
    "all-reduce": (2, links.all_gather),
    "collective-permute": (1, links.permute),
}
