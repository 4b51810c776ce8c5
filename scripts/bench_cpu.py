"""Denoise loop and VAE decode on the CPU: ours against diffusers, on the same weights, steps and dtype, in one run.

    taskset -c 0,1 python scripts/bench_cpu.py --threads 2
    taskset -c 0 python scripts/bench_cpu.py --threads 1

Both sides are timed in turn, round by round, so that a noisy machine hits both; a row holds medians and their ratio.
Compilation is not in the figures (the command's closing table tells it). Rows are JSON lines with device, versions and
commit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flax import nnx  # noqa: E402

from maxdiffusion.attention.plan import AttentionPlan  # noqa: E402
from maxdiffusion.denoise.experts import ExpertSteps  # noqa: E402
from maxdiffusion.denoise.guidance import BatchedGuidance  # noqa: E402
from maxdiffusion.denoise.loop import Denoiser  # noqa: E402
from maxdiffusion.denoise.network import split  # noqa: E402
from maxdiffusion.denoise.solvers import SOLVERS  # noqa: E402
from maxdiffusion.models.dit.context import Context, Contexts  # noqa: E402
from maxdiffusion.runtime.versions import versions  # noqa: E402
from maxdiffusion.weights.checkpoint import open_checkpoint  # noqa: E402
from maxdiffusion.weights.nets import Nets, builders  # noqa: E402


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "wan_tiny")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="torch's; XLA takes the cores that taskset leaves it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    pipeline = diffusers.WanPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    shift, scale = pipeline.scheduler.config.flow_shift, 4.0
    plan = AttentionPlan.parse("auto", heads=pipeline.transformer.config.num_attention_heads)
    nets = Nets(open_checkpoint(args.model), builders(plan, weights_dtype=jnp.float32, dtype=jnp.float32))
    transformer, vae = nets.load("transformer"), nets.load("vae")

    rng = np.random.default_rng(0)
    channels, text_dim = pipeline.transformer.config.in_channels, pipeline.transformer.config.text_dim
    shape = (1, (args.frames - 1) // 4 + 1, args.size // 8, args.size // 8, channels)
    noise = rng.standard_normal(shape, np.float32)
    positive, negative = (rng.standard_normal((1, 512, text_dim), np.float32) for _ in range(2))
    noise_torch = torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy())

    network, params = split(transformer)
    graph = nnx.graphdef(transformer)
    prepare = jax.jit(lambda params, context: nnx.merge(graph, params).prepare(Context(context)))
    solver = SOLVERS["unipc"]
    schedule = solver.schedule(args.steps, shift, "diffusers")
    experts = (ExpertSteps(0, args.steps, guidance_scale=scale),)
    denoiser = Denoiser(network, experts, schedule, solver, BatchedGuidance())
    contexts = Contexts(*(prepare(params, jnp.asarray(text)) for text in (positive, negative)))
    x = jnp.asarray(noise)
    program = denoiser.compile(params, x, contexts.positive)

    def ours_loop() -> jax.Array:
        made = Contexts(*(prepare(params, jnp.asarray(text)) for text in (positive, negative)))
        return jax.block_until_ready(program(params, x, made))

    def their_loop() -> torch.Tensor:
        return pipeline(
            prompt_embeds=torch.from_numpy(positive),
            negative_prompt_embeds=torch.from_numpy(negative),
            height=args.size,
            width=args.size,
            num_frames=args.frames,
            num_inference_steps=args.steps,
            guidance_scale=scale,
            latents=noise_torch.clone(),
            output_type="latent",
        ).frames

    decoded = np.asarray(ours_loop())
    difference = np.abs(decoded.transpose(0, 4, 1, 2, 3) - their_loop().numpy()).max() / np.abs(decoded).max()
    mean, std = (torch.tensor(getattr(pipeline.vae.config, f"latents_{name}")) for name in ("mean", "std"))
    z = torch.from_numpy(decoded.transpose(0, 4, 1, 2, 3).copy()) * std[:, None, None, None] + mean[:, None, None, None]

    @torch.no_grad()
    def their_decode() -> torch.Tensor:
        return pipeline.vae.decode(z, return_dict=False)[0]

    def ours_decode() -> list[jax.Array]:
        return jax.block_until_ready(list(vae.decode_chunks(jnp.asarray(decoded))))

    common = {
        "model": args.model.name,
        "pixels": f"{args.size}x{args.size}x{args.frames}",
        "dtype": "float32",
        "threads": args.threads,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "relative_difference_of_latents": float(f"{difference:.2g}"),
        **versions(),
    }
    cases = {f"denoise, {args.steps} guided steps": (ours_loop, their_loop), "VAE decode": (ours_decode, their_decode)}
    for name, (ours, theirs) in cases.items():
        ours(), theirs()
        times = [(seconds(ours), seconds(theirs)) for _ in range(args.rounds)]
        a, b = (statistics.median(side) for side in zip(*times, strict=True))
        row = {"what": name, "ours_s": round(a, 4), "diffusers_s": round(b, 4), "ratio": round(a / b, 3)}
        print(json.dumps(row | common), flush=True)


if __name__ == "__main__":
    main()
