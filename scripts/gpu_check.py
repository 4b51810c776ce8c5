"""Measures the package on this machine's first device and prints one table; see scripts/gpu_check.sh.

Each part is a process, so that jax and torch do not share the device's memory. A part that fails, or that is not done
when its seconds are over, is a row that says so. Times are medians after the first call, which compiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Row = dict[str, Any]

HEADS, HEAD_DIM = 12, 128
NETWORK = {"num_layers": 30, "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "ffn_dim": 8960}
NETWORK |= {"in_channels": 16, "out_channels": 16, "text_dim": 4096}  # WAN 2.1 T2V 1.3B
SMALL = NETWORK | {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "text_dim": 64}
LATENTS = 21, 60, 104  # 832 x 480 pixels, 81 frames: 32,760 tokens
FEW = 2, 16, 16
SCALE = 5.0


def median(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of a call."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def attention(small: bool) -> Iterator[Row]:
    """Every kernel that runs here in bf16: its error against dense attention in fp32, and its time."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from maxdiffusion.attention.kernels import KERNELS

    def arrays(tokens: int) -> list[jax.Array]:
        rng = np.random.default_rng(0)
        return [jnp.asarray(rng.standard_normal((1, tokens, HEADS, HEAD_DIM), np.float32)) for _ in range(3)]

    exact = KERNELS["dot_product"].local()(*arrays(512))[0]
    timed = arrays(512 if small else 32_760)
    for name, kernel in KERNELS.items():
        if not (kernel.runs_on(jax.default_backend()) and kernel.takes("bfloat16")):
            continue
        local = jax.jit(kernel.local())
        row: Row = {"what": f"attention {name}"}
        found = local(*(each.astype(jnp.bfloat16) for each in arrays(512)))[0].astype(jnp.float32)
        row["error"] = f"{float(jnp.abs(found - exact).max() / jnp.abs(exact).max()):.1e}"
        if small or name != "dot_product":  # whose scores are 26 GB
            half = [each.astype(jnp.bfloat16) for each in timed]
            row["seconds"] = median(lambda local=local, half=half: jax.block_until_ready(local(*half)))
        yield row


def ours(small: bool) -> Iterator[Row]:
    """A guided step of the denoise loop, random weights in bf16."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from maxdiffusion.attention.plan import AttentionPlan
    from maxdiffusion.denoise.experts import ExpertSteps
    from maxdiffusion.denoise.guidance import BatchedGuidance
    from maxdiffusion.denoise.loop import Denoiser
    from maxdiffusion.denoise.network import split
    from maxdiffusion.denoise.solvers import SOLVERS
    from maxdiffusion.models.dit.config import DiTConfig
    from maxdiffusion.models.dit.context import Context, Contexts
    from maxdiffusion.weights.nets import builders

    config = DiTConfig.from_json(SMALL if small else NETWORK)
    plan = AttentionPlan.parse("auto", heads=config.num_attention_heads, platform=jax.default_backend())
    abstract = builders(plan, weights_dtype=jnp.bfloat16, dtype=jnp.bfloat16)["transformer"](config)
    graph, shapes = nnx.split(abstract)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    transformer = nnx.merge(graph, jax.tree.unflatten(tree, drawn))
    network, params = split(transformer)
    steps, solver = 8, SOLVERS["unipc"]
    schedule = solver.schedule(steps, 3.0, "diffusers")
    denoiser = Denoiser(network, (ExpertSteps(0, steps, guidance_scale=SCALE),), schedule, solver, BatchedGuidance())
    prepare = jax.jit(lambda params, text: nnx.merge(nnx.graphdef(transformer), params).prepare(Context(text)))
    texts = (jax.random.normal(jax.random.key(i), (1, 512, config.text_dim)) for i in (1, 2))
    contexts = Contexts(*(prepare(params, text) for text in texts))
    x = jax.random.normal(jax.random.key(3), (1, *(FEW if small else LATENTS), config.in_channels))
    program = denoiser.compile(params, x, contexts.positive)
    ended: list[float] = []

    def on_step(i: int, n: int, state: Any) -> None:
        jax.block_until_ready(state.x)
        ended.append(time.perf_counter())

    program(params, x, contexts, on_step)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ended))
    yield {"what": f"step, {plan.kernel}", "seconds": seconds, "gib": None if peak is None else peak / 2**30}


def theirs(small: bool, compiled: bool) -> Iterator[Row]:
    """The network's two calls of a guided step in diffusers, random weights in bf16, SDPA."""
    import diffusers
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = SMALL if small else NETWORK
    torch.manual_seed(0)
    with torch.device(device):
        transformer = diffusers.WanTransformer3DModel(**config).to(torch.bfloat16).eval()
        x = torch.randn(1, config["in_channels"], *(FEW if small else LATENTS), dtype=torch.bfloat16)
        texts = [torch.randn(1, 512, config["text_dim"], dtype=torch.bfloat16) for _ in range(2)]
        t = torch.tensor([500])
    if compiled:
        transformer.compile_repeated_blocks(fullgraph=False)

    @torch.no_grad()
    def step() -> None:
        a, b = (transformer(x, t, text, return_dict=False)[0] for text in texts)
        (b + SCALE * (a - b)).float().mean().item()

    row = {"what": f"step, diffusers{', torch.compile' if compiled else ''}", "seconds": median(step, 3)}
    yield row | {"gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None}


def demo(small: bool) -> Iterator[Row]:
    """The miniature's four steps, from the command to the mp4."""
    start = time.perf_counter()
    words = ["configs/wan_tiny_4step.yml", "log_level=error", "progress=off", "overwrite=true", "run_name=gpu_check"]
    done = subprocess.run([sys.executable, "generate_wan.py", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    yield {"what": "demo, start to mp4", "seconds": time.perf_counter() - start}


PARTS: dict[str, tuple[Callable[[bool], Iterator[Row]], int]] = {  # and the seconds that each may take
    "attention": (attention, 90),
    "step": (ours, 120),
    "diffusers": (lambda small: theirs(small, False), 60),
    "diffusers compiled": (lambda small: theirs(small, True), 120),
    "demo": (demo, 60),
}


def table(rows: list[Row]) -> str:
    """The rows in columns; `ratio` is the time of our step to the faster of diffusers'."""
    steps = [row for row in rows if row["what"].startswith("step, ") and "seconds" in row]
    others = [row["seconds"] for row in steps if "diffusers" in row["what"]]
    mine = [row for row in steps if "diffusers" not in row["what"]]
    if mine and others:
        mine[0]["ratio"] = f"{mine[0]['seconds'] / min(others):.2f}"
    lines = [("what", "seconds", "GiB", "error", "ratio")]
    for row in rows:
        numbers = (row.get("seconds"), row.get("gib"))
        shown = ("" if number is None else f"{number:.3g}" for number in numbers)
        lines.append((row["what"], *shown, row.get("error", ""), row.get("ratio", "")))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def run(name: str, small: bool) -> list[Row]:
    """The rows of a part, made by a process of its own."""
    command = [sys.executable, __file__, "--part", name, *["--small"] * small]
    try:
        limit = PARTS[name][1] * (5 if small else 1)
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=os.environ)
    except subprocess.TimeoutExpired:
        return [{"what": f"{name}: not done after {PARTS[name][1]} s"}]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"what"')]
    if done.returncode:
        rows.append({"what": f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1][:100]}"})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small network, for a CPU")
    parser.add_argument("--part", choices=PARTS, help="this part alone, as JSON lines")
    args = parser.parse_args(argv)
    if args.part:
        for row in PARTS[args.part][0](args.small):
            print(json.dumps(row), flush=True)
        return 0
    rows = [row for name in PARTS for row in run(name, args.small)]
    versions = "from maxdiffusion.runtime.versions import versions; print(versions())"
    print(subprocess.run([sys.executable, "-c", versions], cwd=ROOT, capture_output=True, text=True).stdout.strip())
    print(table(rows))
    return 1 if any("seconds" not in row and "error" not in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
