"""What the TPU compiler schedules of a Pallas kernel, read from its dump; whole programs: `maxdiffusion.planning`.

Needs libtpu (`pip install "jax[tpu]"`) and no TPU: programs are compiled for a topology in a process of their own. All
figures are static: a kernel's cycles leave out waits for memory, which come to 3 to 4 % where kernels were timed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from maxdiffusion.hardware.chips import GENERATIONS, compile_only, slice_of  # noqa: E402

# The smallest slice of a whole host of each generation.
SLICES = {name: slice_of(f"{name}-8") for name in GENERATIONS}


def compiled(kind: str, program: str, *arguments: str, timeout: float = 600) -> tuple[str, list[str]]:
    """What a Python program prints that compiles for `kind`, and the schedules (`kernels`) of its Pallas kernels.

    Raises:
      RuntimeError: it fails or takes longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        dump += "--xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra"
        environment = os.environ | compile_only(SLICES[kind].topology) | {"LIBTPU_INIT_ARGS": dump}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", program, SLICES[kind].topology, *arguments]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"compiling for {kind} took longer than {timeout:.0f} s") from None
        if done.returncode:
            raise RuntimeError(f"compiling for {kind} failed: {_reason(done.stderr)}")
        files = sorted(Path(folder).glob("*-packed-bundles-post-ra.txt"))
        return done.stdout, [f.read_text(errors="replace") for f in files if "schedule-analysis" not in f.name]


def _reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Oom)\b", line) or "RESOURCE_EXHAUSTED" in line]
    return (named or lines or ["no message"])[-1][:1000]


# ---- kernels: one line of a schedule is one cycle


@dataclasses.dataclass(frozen=True)
class Steps:
    """Cycles of a kernel's grid step.

    Attributes:
      steady: of a step, one figure per alternative branch that has matrix products, in the order of the program.
      once: of what a step can skip and has no products, the first and last step of an output block: both together.
      rounds: of each loop with products inside a step, in the order of the program, one figure per alternative branch
        of its body; they are no part of `steady`.
      products: instructions of the matrix unit in a step, loops counted once and with all branches.
    """

    steady: list[int]
    once: int
    rounds: list[list[int]]
    products: int


_BRANCH = re.compile(r"sbr\.rel \(!?%\w+\) target bundleno = (\d+)")
_CYCLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?: ")
_DELAY = 5  # the branch and its delay slots
_PRODUCT = "vmatmul."


def kernel_steps(schedules: list[str]) -> Steps:
    """The grid step of the kernel with the most matrix products among the schedules.

    The grid is the loop with most products. A forward branch in it skips a region: regions with products are taken for
    alternatives (masked or not), others for the first or last step's.

    Raises:
      ValueError: none of them has a loop with products.
    """
    parsed = [_parse(text) for text in schedules]
    found = [_steps(*one) for one in parsed if sum(one[0])]
    if not any(found):
        raise ValueError("no kernel with matrix products in a loop was compiled")
    return max((steps for steps in found if steps), key=lambda steps: steps.products)


def _parse(schedule: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Products per cycle, and (first cycle, end) of what branches jump over or, with the end first, repeat."""
    products, jumps = [], []
    for line in schedule.splitlines():
        cycle = _CYCLE.match(line)
        if cycle:
            at = int(cycle.group(1), 0)
            products += [0] * (at + 1 - len(products))
            products[at] += line.count(_PRODUCT)
            jumps += [(at + _DELAY, int(target)) for target in _BRANCH.findall(line)]
    return products, jumps


def _steps(products: list[int], jumps: list[tuple[int, int]]) -> Steps | None:
    def work(region: tuple[int, int]) -> int:
        return sum(products[slice(*region)])

    loops = [(target, end) for end, target in jumps if target < end]
    if not loops:
        return None
    grid = max(loops, key=lambda loop: (work(loop), loop[1] - loop[0]))

    def outermost(regions: list[tuple[int, int]], within: tuple[int, int]) -> list[tuple[int, int]]:
        low, high = within
        some = [(a, b) for a, b in regions if low <= a and b <= high and (a, b) != within]
        return [s for s in some if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in some)]

    inner = outermost([loop for loop in loops if work(loop)], grid)
    skips = [(a, b) for a, b in jumps if a < b]
    # What jumps over one such loop alone asks whether it has a round.
    skips = [skip for skip in skips if not any(0 <= a - skip[0] < 16 and 0 <= skip[1] - b < 16 for a, b in inner)]

    def costs(region: tuple[int, int]) -> tuple[list[tuple[int, int]], int]:
        """(cycles, products) of every way through it, and the cycles that only some steps take."""
        base, once, busy = region[1] - region[0], 0, work(region)
        ways: list[tuple[int, int]] = []
        apart = [loop for loop in inner if loop != region]
        here = outermost([skip for skip in skips if not any(a <= skip[0] and skip[1] <= b for a, b in apart)], region)
        for loop in outermost(apart, region):
            if not any(a <= loop[0] and loop[1] <= b for a, b in here):
                base, busy = base - (loop[1] - loop[0]), busy - work(loop)
        for skip in here:
            base -= skip[1] - skip[0]
            busy -= work(skip)
            if work(skip):
                some, more = costs(skip)
                ways += some
                once += more
            else:
                once += skip[1] - skip[0]
        return [(base + cycles, busy + count) for cycles, count in ways or [(0, 0)]], once

    ways, once = costs(grid)
    rounds = [[cycles for cycles, _ in costs(loop)[0]] for loop in inner]
    return Steps([cycles for cycles, _ in ways], once, rounds, work(grid))
