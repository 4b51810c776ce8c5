"""One transformer block as wide as the 1.3B model's on a CPU, in fp32: ours against diffusers' (torch eager).

    taskset -c 0 python scripts/bench_block.py                # 1,560 tokens: one latent frame of 832x480

Both have the same weights; the text's keys and values, which ours computes once for all steps, are left out of
diffusers' time. The row tells the matrix products of the linear layers alone, too: XLA's and torch's. Times are the
best of the rounds, both sides in turn, in seconds of the process's own CPU time where one core is given (other load
does not count) and of the wall otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.models.dit.block import Block, Signal
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.rope import rotary_tables
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.runtime.versions import versions

DIM, HEADS, FFN = 1536, 12, 8960
CORES = len(os.sched_getaffinity(0))
clock = time.process_time if CORES == 1 else time.perf_counter


def parameters(theirs: WanTransformerBlock, state: Any) -> Any:
    """The block's parameters, of diffusers' weights."""
    weights = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}

    def found(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = ".".join(map(str, path)).replace("to_out", "to_out.0")
        name = name.replace("ffn.linear_1", "ffn.net.0.proj").replace("ffn.linear_2", "ffn.net.2")
        stem = name.removesuffix(".kernel").removesuffix(".scale")
        value = weights[name] if stem == name else weights[f"{stem}.weight"]
        return jnp.asarray(value.T if name.endswith(".kernel") else value).reshape(leaf.shape)

    return nnx.from_flat_state([(path, leaf.replace(found(path, leaf))) for path, leaf in nnx.to_flat_state(state)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=(1, 30, 52), help="tokens: frames, rows, columns")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(CORES)
    torch.set_grad_enabled(False)
    frames, rows, columns = grid = tuple(args.grid)
    tokens, rng = frames * rows * columns, np.random.default_rng(0)
    x, text, time_vectors = (
        rng.standard_normal(shape, np.float32) for shape in ((1, tokens, DIM), (1, 512, DIM), (1, 6, DIM))
    )

    theirs = WanTransformerBlock(DIM, FFN, HEADS, "rms_norm_across_heads", True, 1e-6).eval()
    rotary = WanRotaryPosEmbed(DIM // HEADS, (1, 2, 2), 1024)(torch.zeros(1, 16, frames, 2 * rows, 2 * columns))
    x_torch, text_torch, time_torch = map(torch.from_numpy, (x, text, time_vectors))

    config = DiTConfig(1, HEADS, DIM // HEADS, FFN, in_channels=16, out_channels=16, text_dim=4096)
    graph, state = nnx.split(Block(config, AttentionPlan.parse("auto", heads=HEADS), Dtypes()))
    state = parameters(theirs, state)
    cos, sin = rotary_tables(grid, DIM // HEADS)
    sources = nnx.merge(graph, state).sources(jnp.asarray(text))

    @jax.jit
    def block(state: Any, x: jax.Array, sources: Any, cos: jax.Array, sin: jax.Array) -> jax.Array:
        signal = Signal(None, jnp.asarray(time_vectors)[:, None], cos, sin, None, None, grid)
        return nnx.merge(graph, state)(x, signal, sources)

    widths = [(DIM, DIM)] * 6 + [(DIM, FFN), (FFN, DIM)]  # q, k, v, out; q, out; the feed-forward's two
    given = {c: rng.standard_normal((tokens, c), np.float32) for c in (DIM, FFN)}
    kernels = [rng.standard_normal(width, np.float32) for width in widths]
    ours_of = [(jnp.asarray(given[k.shape[0]]), jnp.asarray(k)) for k in kernels]
    theirs_of = [(torch.from_numpy(given[k.shape[0]]), torch.from_numpy(k.T.copy())) for k in kernels]
    product = jax.jit(jnp.matmul)
    cross, x_jax = theirs.attn2, jnp.asarray(x)
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(block(state, x_jax, sources, cos, sin)),
        "diffusers": lambda: theirs(x_torch, text_torch, time_torch, rotary),
        "text": lambda: (cross.norm_k(cross.to_k(text_torch)), cross.to_v(text_torch)),
        "products_ours": lambda: jax.block_until_ready([product(*each) for each in ours_of]),
        "products_torch": lambda: [torch.nn.functional.linear(*each) for each in theirs_of],
    }
    difference = np.abs(np.asarray(runs["ours"]()) - runs["diffusers"]().numpy()).max()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    best = {name: min(each[1:]) for name, each in times.items()}
    best["diffusers"] -= best.pop("text")
    row: dict[str, Any] = {"what": "block of 1.3B width", "tokens": tokens, "cores": CORES}
    row |= {f"{name}_s": round(value, 3) for name, value in best.items()}
    row["ratio"] = round(best["ours"] / best["diffusers"], 3)
    row["ratio_of_products"] = round(best["products_ours"] / best["products_torch"], 3)
    row["largest_difference"] = float(f"{difference:.2g}")
    print(json.dumps(row | {"torch": torch.__version__, "diffusers": diffusers.__version__} | versions()))


if __name__ == "__main__":
    main()
