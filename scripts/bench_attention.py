"""Attention kernels on this machine, as ratios to torch's SDPA in the same run (or to dense attention without torch).

    python scripts/bench_attention.py [shape ...] [dtype=bfloat16] [repeats=5] [threads=1]

Each row is the best of `repeats` runs; the kernels take turns, so that a busy machine slows all of them alike. With
threads=1 the process is pinned to one core.
"""

import os
import sys
import time
from collections.abc import Callable

# name -> (batch, query tokens, keys, heads, head dim)
SHAPES = {
    "tiny-self": (2, 180, 180, 8, 16),
    "tiny-cross": (2, 180, 512, 8, 16),
    "720-self": (2, 720, 720, 8, 32),
    "1.3b-2k-self": (1, 2048, 2048, 12, 128),
    "1.3b-2k-cross": (1, 2048, 512, 12, 128),
    "head-8k-self": (1, 8192, 8192, 1, 128),
}


def main(words: list[str]) -> None:
    options = dict(word.split("=", 1) for word in words if "=" in word)
    names = [word for word in words if "=" not in word] or list(SHAPES)
    unknown = [name for name in names if name not in SHAPES] + [key for key in options if key not in _OPTIONS]
    if unknown:
        sys.exit(f"error: {unknown[0]} is unknown; shapes: {', '.join(SHAPES)}; options: {', '.join(_OPTIONS)}")
    options = _OPTIONS | options
    if options["threads"] == "1":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(f"{'shape':<14} {'kernel':<12} {'ms':>9} {'ratio':>6} {'temporary MB':>13}   ({options['dtype']})")
    for name in names:
        rows = measure(SHAPES[name], options["dtype"], int(options["repeats"]), int(options["threads"]))
        base = next(iter(rows.values()))[0]
        for kernel, (seconds, memory) in rows.items():
            shown = "" if memory is None else f"{memory / 1e6:.1f}"
            print(f"{name:<14} {kernel:<12} {seconds * 1e3:>9.2f} {seconds / base:>6.2f} {shown:>13}", flush=True)


def measure(shape: tuple[int, ...], dtype: str, repeats: int, threads: int) -> dict[str, tuple[float, int | None]]:
    """Seconds and temporary bytes per kernel; the first is what the others are compared with."""
    import jax
    import numpy as np

    from maxdiffusion.attention.kernels import KERNELS
    from maxdiffusion.attention.plan import PLATFORMS

    batch, tokens, keys, heads, dim = shape
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((batch, n, heads, dim), dtype=np.float32) for n in (tokens, keys, keys)]
    runs: dict[str, tuple[Callable[[], object], int | None]] = {}
    try:
        import torch
    except ImportError:
        print("(torch is not installed: ratios are to dot_product)")
    else:
        torch.set_num_threads(threads)
        tensors = [torch.tensor(a).to(getattr(torch, dtype)).transpose(1, 2) for a in arrays]
        runs["torch sdpa"] = (lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)), None
    inputs = [jax.numpy.asarray(a, dtype) for a in arrays]
    for name, kernel in KERNELS.items():
        if jax.default_backend() not in PLATFORMS[name]:
            continue
        compiled = jax.jit(lambda *a, kernel=kernel: kernel(*a)[0].astype(dtype)).lower(*inputs).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        runs[name] = (lambda compiled=compiled: compiled(*inputs).block_until_ready()), memory

    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats + 1):
        for name, (run, _) in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: (best[name], memory) for name, (_, memory) in runs.items()}


_OPTIONS = {"dtype": "float32", "repeats": "5", "threads": "1"}

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(sys.argv[1:])
