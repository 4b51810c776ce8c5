"""Attention timed on the devices of this machine; as a TPU's compiler schedules it: `scripts/tpu.py schedule`.

    python scripts/bench_attention.py [shape ...] [dtype=bfloat16] [repeats=5] [threads=1] [out=FILE.jsonl]
    python scripts/bench_attention.py [shape ...] mode=ulysses_ring [ulysses_shards=4]

The first form times every kernel that runs here, as ratios to torch's SDPA in the same run (or to the first kernel
without torch); each row is the best of `repeats` runs, and the kernels take turns, so that a busy machine slows all of
them alike. With threads=1 the process is pinned to one core. The second form times one mode over all devices.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def main(words: list[str]) -> None:
    options = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word] or list(SMALL)
    unknown = [name for name in names if name not in SHAPES] + [key for key in options if key not in OPTIONS]
    if unknown:
        sys.exit(f"error: {unknown[0]} is unknown; shapes: {', '.join(SHAPES)}; options: {', '.join(OPTIONS)}")
    options = OPTIONS | options
    if options["threads"] == "1" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    from maxdiffusion.runtime.versions import versions

    made_with = versions()
    print(", ".join(f"{key} {made_with[key]}" for key in ("device_kind", "device_count", "jax", "commit")))
    for row in (row for name in names for row in measured(name, options)):
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if options["out"]:
            with open(options["out"], "a", encoding="utf-8") as file:
                file.write(json.dumps(made_with | row) + "\n")


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
        if jax.default_backend() in kernel.platforms:
            local = kernel.local()
            compiled = jax.jit(lambda *a, local=local: local(*a)[0].astype(dtype)).lower(*inputs).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes
            runs[name] = (lambda compiled=compiled: compiled(*inputs).block_until_ready()), memory
    return runs


def _mode(shape: tuple[int, ...], options: dict[str, str]) -> Runs:
    """Self-attention (or cross-attention, where the keys are others) split over every device."""
    import jax

    from maxdiffusion import parallel
    from maxdiffusion.attention.api import cross_attention, self_attention
    from maxdiffusion.attention.plan import AttentionPlan

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


if __name__ == "__main__":
    main(sys.argv[1:])
