"""Counts the cycles of `kernels.flash` for `planning.kernels.FLASH`.

    python scripts/tpu_kernels.py [v6e ...]

Needs libtpu and no TPU. For each generation it compiles the kernel alone with the default blocks for 18,900 tokens and
keys, and prints the row of the table. One to three minutes each on one core.
"""

from __future__ import annotations

import os
import sys

import bench_attention
import tpu_schedule

from maxdiffusion.planning.kernels import FLASH, TILE


def main(names: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in names or tpu_schedule.SLICES:
        row, width = bench_attention.kernel_schedule(name, "flash", 18_900, 18_900, {}), FLASH[name].width
        rows, span = int(row["blocks"].split("/")[0]), row["span"]
        tiles = -(-rows // width) * width * span / TILE**2
        bound, running = (cycles / tiles for cycles in row["round_cycles"][0])
        start, once = row["step_cycles"][0], row["once_cycles"] * TILE / rows
        print(f'"{name}": Cycles({start:.1f}, {bound:.1f}, {running:.1f}, {once:.1f}, {width}),', flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
