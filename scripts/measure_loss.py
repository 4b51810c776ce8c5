"""What each approximation loses: of a random transformer block of the 14B model's width, and of the miniature's video.

    python scripts/measure_loss.py            # both tables; 2.5 GB and a minute on two cores

A row of the first is the root mean square of the error in what the block adds to its input, relative to what it adds.
The second is that of `compare=[...]` on 24 steps: calls of the network, PSNR and SSIM of the frames.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.cli import main as generate
from maxdiffusion.hardware.quantization import Quantization
from maxdiffusion.models.dit.block import Block, Signal
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.rope import rotary_tables
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.quantized import quantize

ROOT = Path(__file__).resolve().parents[1]
HEADS, HEAD_DIM, FFN = 40, 128, 13824
BLOCK: dict[str, tuple[Quantization | None, str]] = {
    "quantization=int8": (Quantization("int8"), "none"),
    "quantization=fp8": (Quantization("float8_e4m3fn"), "none"),
    "int8 weights alone (auto)": (Quantization("int8", products=False), "none"),
    "attention_quantization=fp8": (None, "fp8"),
    "quantization=fp8 attention_quantization=fp8": (Quantization("float8_e4m3fn"), "fp8"),
}
VIDEO = (
    "quantization=int8",
    "quantization=fp8",
    "attention_quantization=fp8",
    "cache=taylor",
    "cache=sea",
    "cache=first_block",
    "cache=spectrum",
    "low_resolution_steps=3",
)


def weights(state: Any) -> dict[tuple[Any, ...], jax.Array]:
    """Random numbers by path: of a matrix with the variance of 1 / inputs, of norms near 1, of biases near 0."""
    rng, found = np.random.default_rng(0), {}
    for path, leaf in nnx.to_flat_state(state):
        scale = leaf.shape[0] ** -0.5 if path[-1] == "kernel" else 0.1
        found[path] = jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * scale + (path[-1] == "scale"))
    return found


def block(numbers: dict[tuple[Any, ...], jax.Array], quantization: Quantization | None, attention: str) -> jax.Array:
    """What a block adds to random tokens, b s e."""
    config = DiTConfig(1, HEADS, HEAD_DIM, FFN, in_channels=16, out_channels=16, text_dim=4096)
    plan = AttentionPlan.parse("auto", heads=HEADS, quantization=attention)
    graph, state = nnx.split(Block(config, plan, Dtypes(quantization=quantization)))
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        kernel = numbers.get((*path[:-1], "kernel"))
        if path[-1] == "kernel_scale":
            assert kernel is not None and quantization is not None
            value = quantize(kernel.T, quantization.dtype).scale[:, 0]
        elif path[-1] == "kernel" and leaf.dtype != jnp.float32:
            assert kernel is not None and quantization is not None
            value = quantize(kernel.T, quantization.dtype).values.T
        else:
            value = numbers[path]
        filled.append((path, leaf.replace(value)))
    state = nnx.from_flat_state(filled)
    grid, dim = (2, 12, 20), HEADS * HEAD_DIM
    draw = np.random.default_rng(1)
    x, text, time = (
        jnp.asarray(draw.standard_normal(shape, np.float32)) for shape in ((1, 480, dim), (1, 64, dim), (1, 1, 6, dim))
    )
    signal = Signal(None, time, *rotary_tables(grid, HEAD_DIM), None, None, grid)

    @jax.jit
    def added(state: Any, x: jax.Array, text: jax.Array) -> jax.Array:
        module = nnx.merge(graph, state)
        return module(x, signal, module.sources(text)) - x

    return added(state, x, text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    config = DiTConfig(1, HEADS, HEAD_DIM, FFN, in_channels=16, out_channels=16, text_dim=4096)
    abstract = nnx.eval_shape(lambda: Block(config, AttentionPlan.parse("auto", heads=HEADS), Dtypes()))
    numbers = weights(nnx.split(abstract)[1])
    exact = block(numbers, None, "none")
    print("| a block of 14B width | error of its output, % |\n|---|---|")
    for name, variant in BLOCK.items():
        error = jnp.sqrt(jnp.mean((block(numbers, *variant) - exact) ** 2) / jnp.mean(exact**2))
        print(f"| `{name}` | {100 * error:.2f} |", flush=True)
    numbers.clear()
    with tempfile.TemporaryDirectory() as folder:
        words = ["prompt=a red circle moving right on a navy background", "num_inference_steps=24"]
        compare = f"compare=[{', '.join(VIDEO)}]"
        sys.argv[1:] = [str(ROOT / "configs/wan_tiny.yml"), *words, compare, f"output_dir={folder}"]
        generate()


if __name__ == "__main__":
    main()
