"""Attention on the devices of this machine, or as a TPU's compiler schedules it.

    python scripts/bench_attention.py [shape ...] [dtype=bfloat16] [repeats=5] [threads=1] [out=FILE.jsonl]
    python scripts/bench_attention.py [shape ...] mode=ulysses_ring [ulysses_shards=4]
    python scripts/bench_attention.py [shape ...] --tpu-schedule v6e [mode=ulysses_ring] [ulysses_shards=4] [--tune]

The first form times every kernel that runs here, as ratios to torch's SDPA in the same run (or to the first kernel
without torch); each row is the best of `repeats` runs, and the kernels take turns, so that a busy machine slows all of
them alike. With threads=1 the process is pinned to one core. The second form times one mode over all devices.

The third needs libtpu and no TPU (see `tpu_schedule`): it prints the cycles of a grid step (of `flash`: with a bound
as maximum, with a running one, and masked; of the others unmasked, and masked), of what the first and last step of an
output block add, TF/s and use of the matrix unit in a step of the first kind and over the whole call (padding, masked
tail and statistics included), and which collectives of the mode lie beside a kernel.
`kernel=NAME block_q=N block_kv=N block_kv_compute=N` choose another kernel or blocks; `--tune` searches the blocks and
prints the fastest.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tpu_schedule

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# name -> (batch, query tokens, keys, heads, head dim)
SMALL = {
    "tiny-self": (2, 180, 180, 8, 16),
    "tiny-cross": (2, 180, 512, 8, 16),
    "720-self": (2, 720, 720, 8, 32),
    "1.3b-2k-self": (1, 2048, 2048, 12, 128),
    "1.3b-2k-cross": (1, 2048, 512, 12, 128),
    "head-8k-self": (1, 8192, 8192, 1, 128),
}
# 81 frames of 480 x 832 are 21 x 30 x 52 tokens, of 720 x 1280 21 x 45 x 80; the text has 512.
OFFICIAL = {
    f"{model}-{size}-{kind}": (1, tokens, tokens if kind == "self" else 512, heads, 128)
    for model, heads in (("14b", 40), ("1.3b", 12))
    for size, tokens in (("480p", 32_760), ("720p", 75_600))
    for kind in ("self", "cross")
}
SHAPES = SMALL | OFFICIAL
OPTIONS = {"dtype": "float32", "repeats": "5", "threads": "1", "out": "", "mode": "", "ulysses_shards": "-1"}
STATIC = {"mode": "ulysses_ring", "ulysses_shards": "4", "kernel": "", "out": ""}
BLOCKS = ("block_q", "block_kv", "block_kv_compute")


def main(words: list[str]) -> None:
    static = "--tpu-schedule" in words
    kind = words.pop(words.index("--tpu-schedule") + 1) if static and words[-1] != "--tpu-schedule" else ""
    tune = "--tune" in words
    words = [word for word in words if word not in ("--tpu-schedule", "--tune")]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word] or (["14b-720p-self"] if static else list(SMALL))
    known = {**STATIC, **dict.fromkeys(BLOCKS, "")} if static else OPTIONS
    unknown = [name for name in names if name not in SHAPES] + [key for key in options if key not in known]
    if unknown:
        sys.exit(f"error: {unknown[0]} is unknown; shapes: {', '.join(SHAPES)}; options: {', '.join(known)}")
    if static and kind not in tpu_schedule.SLICES:
        sys.exit(f"error: --tpu-schedule takes one of {', '.join(tpu_schedule.SLICES)}, not {kind!r}")
    options = known | options
    if static:
        os.environ["JAX_PLATFORMS"] = "cpu"
        rows = (row for name in names for row in scheduled(name, kind, options, tune))
    else:
        if options["threads"] == "1" and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        rows = (row for name in names for row in measured(name, options))

    from maxdiffusion.runtime.versions import versions

    made_with = versions()
    print(", ".join(f"{key} {made_with[key]}" for key in ("device_kind", "device_count", "jax", "commit")))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if options["out"]:
            with open(options["out"], "a", encoding="utf-8") as file:
                file.write(json.dumps(made_with | row) + "\n")


# ---- on the devices of this machine


def measured(name: str, options: dict[str, str]) -> list[dict[str, Any]]:
    """One row per kernel; the first is what the others are compared with."""
    runs = _mode(SHAPES[name], options) if options["mode"] else _kernels(SHAPES[name], options)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(int(options["repeats"]) + 1):
        for kernel, (run, _) in runs.items():
            start = time.perf_counter()
            run()
            best[kernel] = min(best[kernel], time.perf_counter() - start)
    base = next(iter(best.values()))
    return [
        {
            "shape": name,
            "dtype": options["dtype"],
            "kernel": kernel,
            "ms": round(best[kernel] * 1e3, 2),
            "ratio": round(best[kernel] / base, 2),
            "temporary_mb": None if memory is None else round(memory / 1e6, 1),
        }
        for kernel, (_, memory) in runs.items()
    ]


Runs = dict[str, tuple[Callable[[], object], int | None]]


def _kernels(shape: tuple[int, ...], options: dict[str, str]) -> Runs:
    import jax

    from maxdiffusion.attention.kernels import KERNELS
    from maxdiffusion.attention.plan import PLATFORMS

    dtype = options["dtype"]
    arrays = _arrays(shape)
    runs: Runs = {}
    try:
        import torch
    except ImportError:
        print("(torch is not installed: ratios are to the first kernel)")
    else:
        torch.set_num_threads(int(options["threads"]))
        tensors = [torch.tensor(a).to(getattr(torch, dtype)).transpose(1, 2) for a in arrays]
        runs["torch sdpa"] = (lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)), None
    inputs = [jax.numpy.asarray(a, dtype) for a in arrays]
    for name, kernel in KERNELS.items():
        # Off TPUs, Pallas interprets the kernels of TPUs, which says nothing of their speed.
        if jax.default_backend() in PLATFORMS[name]:
            compiled = jax.jit(lambda *a, kernel=kernel: kernel(*a)[0].astype(dtype)).lower(*inputs).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes
            runs[name] = (lambda compiled=compiled: compiled(*inputs).block_until_ready()), memory
    return runs


def _mode(shape: tuple[int, ...], options: dict[str, str]) -> Runs:
    """Self-attention (or cross-attention, where the keys are others) split over every device."""
    import jax

    from maxdiffusion import parallel
    from maxdiffusion.attention import AttentionPlan, cross_attention, self_attention

    _, tokens, keys, heads, _ = shape
    count = jax.device_count()
    plan = AttentionPlan.parse(
        options["mode"],
        heads=heads,
        context=count,
        ulysses_shards=int(options["ulysses_shards"]),
        platform=jax.default_backend(),
    )
    mesh = parallel.make_mesh(parallel.Degrees(context=count), ulysses=plan.ulysses)
    place = parallel.Placement(mesh, parallel.rules_for())
    attend = self_attention if keys == tokens else cross_attention
    inputs = [jax.numpy.asarray(a, options["dtype"]) for a in _arrays(shape)]
    with parallel.use(place):
        compiled = jax.jit(lambda *a: attend(plan, *a)).lower(*inputs).compile()
    label = f"{plan.scheme} ring {plan.ring} x ulysses {plan.ulysses} {plan.kernel}"
    return {label: ((lambda: compiled(*inputs).block_until_ready()), compiled.memory_analysis().temp_size_in_bytes)}


def _arrays(shape: tuple[int, ...]) -> list[Any]:
    import numpy as np

    batch, tokens, keys, heads, dim = shape
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, n, heads, dim), dtype=np.float32) for n in (tokens, keys, keys)]


# ---- as a TPU's compiler schedules it

_SETUP = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P
from maxdiffusion import parallel
topology, given = sys.argv[1], json.loads(sys.argv[2])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
"""

# One device's work between collectives: two heads; keys are counted at run time.
_KERNEL = (
    _SETUP
    + """
import inspect
from maxdiffusion.attention import block_sizes
from maxdiffusion.attention.kernels import KERNELS
from maxdiffusion.attention.options import KernelOptions
tokens, keys, name = given["tokens"], given["keys"], given["kernel"]
options = KernelOptions(**given["blocks"])
choose = block_sizes.flash_blocks if name == "flash" else block_sizes.blocks
sizes = choose(devices[0].device_kind, tokens, keys, options)
place = parallel.Placement(parallel.make_mesh(parallel.Degrees(), devices=devices[:1]), parallel.rules_for())
shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=place.sharding())
q, k = (shape((1, n, 2, 128), jnp.bfloat16) for n in (tokens, keys))
run = jax.shard_map(lambda *a: KERNELS[name](*a, options=options), mesh=place.mesh, in_specs=P(), out_specs=P(),
                    check_vma=False)
with parallel.use(place):
    jax.jit(run).lower(q, k, k, shape((1, keys), bool)).compile()
print(json.dumps([sizes.q, sizes.kv, sizes.compute, block_sizes.span(sizes)]))
"""
)

_MODE = (
    _SETUP
    + """
from maxdiffusion.attention import AttentionPlan, self_attention, cross_attention
count = len(devices)
plan = AttentionPlan.parse(given["mode"], heads=given["heads"], context=count, ulysses_shards=given["ulysses_shards"],
                           platform="tpu")
mesh = parallel.make_mesh(parallel.Degrees(context=count), ulysses=plan.ulysses, devices=devices)
place = parallel.Placement(mesh, parallel.rules_for())
attend = self_attention if given["tokens"] == given["keys"] else cross_attention
def shape(tokens, axis):
    sharding = place.sharding(None, axis if tokens % count == 0 else None, None, None)
    return jax.ShapeDtypeStruct((1, tokens, given["heads"], 128), jnp.bfloat16, sharding=sharding)
q, k = shape(given["tokens"], "sequence"), shape(given["keys"], "sequence" if attend is self_attention else None)
with parallel.use(place):
    print(jax.jit(lambda *a: attend(plan, *a)).lower(q, k, k).compile().as_text())
"""
)


def kernel_schedule(kind: str, kernel: str, tokens: int, keys: int, blocks: dict[str, int]) -> dict[str, Any]:
    """Static figures of one call of a kernel with a masked tail and statistics, for one head of dim 128 in bf16.

    Raises:
      RuntimeError: it does not compile.
    """
    device = tpu_schedule.SLICES[kind].generation
    given = {"kernel": kernel, "tokens": tokens, "keys": keys, "blocks": blocks}
    printed, schedules = tpu_schedule.compiled(kind, _KERNEL, json.dumps(given))
    q, kv, compute, span = json.loads(printed)
    steps = tpu_schedule.kernel_steps(schedules)
    rows, columns = -(-tokens // q), -(-keys // kv)
    if steps.rounds:  # of `span` keys, and of the parts that are left over in a block
        parts, seen = span // compute, [min(kv, keys - at) for at in range(0, keys, kv)]
        full, rest = (sum(f(-(-n // compute), parts) for n in seen) for f in (int.__floordiv__, int.__mod__))
        of_row = columns * steps.steady[0] + full * steps.rounds[0][0] + rest * steps.rounds[-1][0]
        unit, busy = [way / span for way in steps.rounds[0]], full * span + rest * compute
    else:
        of_row = (columns - 1) * steps.steady[0] + steps.steady[-1 if keys % kv else 0]
        unit, busy = [way / kv for way in steps.steady], columns * kv
    cycles = rows * (of_row + steps.once)

    def rate(products: float, cycles: float) -> int:
        return round(device.tensor_cores * 4 * products * 128 / cycles * device.ghz / 1e3)

    ceiling = device.ceiling / 1e12
    return {
        "blocks": f"{q}/{kv}/{compute}",
        "span": span,
        "padding": f"{rows * q * busy / (tokens * keys) - 1:.1%}",
        "step_cycles": steps.steady,
        "once_cycles": steps.once,
        "round_cycles": steps.rounds,
        "step_tflops": [rate(q, each) for each in unit],
        "tflops": rate(tokens * keys, cycles),
        "of_ceiling": f"{rate(tokens * keys, cycles) / ceiling:.0%}",
    }


def scheduled(name: str, kind: str, options: dict[str, str], tune: bool) -> list[dict[str, Any]]:
    """Rows of the kernel that a mode runs on one device of `kind`, and of the mode's collectives."""
    from maxdiffusion.attention import AttentionPlan
    from maxdiffusion.planning import schedule

    _, tokens, keys, heads, _ = SHAPES[name]
    devices = tpu_schedule.SLICES[kind].devices
    given = {key: int(options[key]) for key in BLOCKS if options[key]}
    degree = int(options["ulysses_shards"])
    plan = AttentionPlan.parse(options["mode"], heads=heads, context=devices, ulysses_shards=degree, platform="tpu")
    # Ulysses gathers the tokens of its group for some heads; local and cross-attention keep their queries.
    whole = plan.scheme == "local" or keys != tokens
    queries, seen = (-(-tokens // devices), keys) if whole else (-(-tokens // plan.ring), -(-keys // plan.ring))
    kernel = options["kernel"] or plan.kernel
    split = f"{plan.scheme} ring {plan.ring} x ulysses {plan.ulysses}"
    row = {"shape": name, "tpu": kind, "mode": split, "kernel": kernel, "tokens": queries, "keys": seen}
    rows = []
    for blocks in _candidates() if tune else [given]:
        try:
            rows.append(row | kernel_schedule(kind, kernel, queries, seen, blocks))
        except RuntimeError as error:
            if not tune:
                raise
            rows.append(row | {"blocks": blocks, "failed": str(error)[:200]})
        if tune:
            print(rows[-1], flush=True)
    if tune:
        return sorted(rows, key=lambda row: -row.get("tflops", 0))[:1]
    mode = {"mode": options["mode"], "heads": heads, "tokens": tokens, "keys": keys, "ulysses_shards": degree}
    hlo, _ = tpu_schedule.compiled(kind, _MODE, json.dumps(mode))
    found = list(schedule.collectives(schedule.steps(hlo)))
    for each in sorted({one.kind for one, _ in found}):
        beside = [kernels > 0 for one, kernels in found if one.kind == each]
        rows.append(
            {"shape": name, "tpu": kind, "mode": split, each: f"{sum(beside)} of {len(beside)} beside a kernel"}
        )
    return rows


def _candidates() -> list[dict[str, int]]:
    return [
        {"block_q": q, "block_kv": kv, "block_kv_compute": compute}
        for q, kv, compute in itertools.product((2048, 3200, 4736), (2048, 6400), (256, 512, 1024))
        if kv % compute == 0
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
