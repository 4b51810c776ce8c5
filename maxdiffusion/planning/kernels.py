"""Cycles of Pallas kernels, which the compiler does not tell in a program's text; imports no jax.

`FLASH` was counted by `scripts/tpu.py kernels` in the schedules of `kernels.flash` alone, with the default blocks. A
grid step of it, however long the sequence, costs a start and so much for each tile of 256 queries by 256 keys. Static:
waits for memory are left out, which came to 3 to 4 % where such kernels were timed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType

from maxdiffusion.hardware.chips import Generation
from maxdiffusion.planning.schedule import Kernel


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Of a grid step of `kernels.flash` in bf16, at a head dim of 128, on one tensor core.

    Attributes:
      start: of every step.
      bound: of a tile, where a bound takes the place of the maximum.
      running: of a tile with a running maximum.
      once: of the first and the last step of a block of queries, for 256 of them.
      width: queries that a product takes; it takes as long for fewer.
    """

    start: float
    bound: float
    running: float
    once: float
    width: int


FLASH: Mapping[str, Cycles] = MappingProxyType(
    {
        "v5e": Cycles(924.0, 276.1, 301.2, 126.0, 128),
        "v6e": Cycles(669.0, 105.9, 112.4, 88.8, 256),
        "v5p": Cycles(992.0, 276.1, 301.4, 129.7, 128),
        "TPU7x": Cycles(819.0, 107.2, 121.0, 72.1, 256),
    }
)
FP32 = 6  # passes of a product
OTHERS = 0.5  # of the ceiling: what splash kernels with segments and statistics reach, 312 of 612 TF/s on v6e
TILE = 256


def cycles(kernel: Kernel, generation: Generation, *, running: bool = False) -> float | None:
    """Cycles of a call of an attention kernel; None where the kernel is no attention that is known.

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
        per_cycle = OTHERS * generation.ceiling / (generation.ghz * 1e9)
        return 4 * rows * keys * dim / per_cycle if "splash" in kernel.name else None
    block_q, block_kv = int(blocks[1]), int(blocks[2])
    cost = FLASH[generation.name]
    tiles = -(-block_q // cost.width) * cost.width * block_kv / TILE**2
    step = cost.start + tiles * (cost.running if running else cost.bound)
    blocks_q = math.prod(q[:-2]) * math.ceil(q[-2] / block_q)
    total = blocks_q * (keys // block_kv * step + cost.once * block_q / TILE)
    return total * (FP32 if dtype == "f32" else 1) * math.ceil(dim / 128) / generation.tensor_cores
