"""Counts the cycles of `kernels.flash` and fits `planning.kernels.FLASH` to them.

    python scripts/tpu_kernels.py [v6e ...]

Needs libtpu and no TPU. For each generation it compiles the kernel alone with small blocks, prints the row of the table
that they give, and then by how much that misses a step with the default blocks for 18,900 tokens, which the fit has not
seen: with a bound and with a running maximum. One to five minutes each on one core.
"""

from __future__ import annotations

import os
import sys

import bench_attention
import tpu_schedule

from maxdiffusion.attention.block_sizes import flash_blocks
from maxdiffusion.planning.kernels import FLASH, TILE

FITTED = ((2048, 512), (4096, 512))


def main(names: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in names or tpu_schedule.SLICES:
        default = flash_blocks(tpu_schedule.SLICES[name].generation.kind, 18_900, 18_900)
        (few, less), (many, more) = [
            (q * kv / TILE**2, count(name, 2 * q, 2 * kv, _blocks(q, kv, min(default.compute, kv)))) for q, kv in FITTED
        ]
        bound = (more[0] - less[0]) / (many - few)
        start = less[0] - few * bound
        running = (more[1] - start) / many
        print(f'"{name}": Cycles({start:.1f}, {bound:.1f}, {running:.1f}, {more[2] / 16:.1f}, ...),', flush=True)
        width = FLASH[name].width
        whole = -(-default.q // width) * width * default.kv / TILE**2
        told = start + whole * bound, start + whole * running
        seen = count(name, 18_900, 18_900, {})
        misses = [f"{ours / theirs - 1:+.1%}" for ours, theirs in zip(told, seen[:2], strict=True)]
        print(f"    {default.q} x {default.kv}: {', '.join(misses)}", flush=True)


def _blocks(q: int, kv: int, compute: int) -> dict[str, int]:
    return {"block_q": q, "block_kv": kv, "block_kv_compute": compute}


def count(name: str, tokens: int, keys: int, blocks: dict[str, int]) -> tuple[int, int, int]:
    """Cycles of a grid step with a bound, with a running maximum, and of the first and last of a block of queries."""
    row = bench_attention.kernel_schedule(name, "flash", tokens, keys, blocks)
    print("   ", row["blocks"], row["step_cycles"], row["once_cycles"], flush=True)
    return (*row["step_cycles"], row["once_cycles"])


if __name__ == "__main__":
    main(sys.argv[1:])
