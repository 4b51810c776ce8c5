"""The VAE: formulations of its 3-D convolution, decode time against diffusers, memory of the official size, and files.

    taskset -c 0 python scripts/bench_vae.py conv                           # GFLOP/s of each formulation and of torch
    taskset -c 0 python scripts/bench_vae.py decode --base 16 --res-blocks 1 --size 96 --frames 17
    taskset -c 0 python scripts/bench_vae.py decode --base 96 --res-blocks 2 --size 64 --frames 5
    python scripts/bench_vae.py memory --dtype bfloat16                     # compiled without allocating anything
    python scripts/bench_vae.py write --seconds 0.15 --frames 81            # an mp4 beside a decode and after it

`write` takes a moving picture in chunks of four frames, each after so many seconds of sleep, as of an accelerator that
leaves the host idle. `host_mb` is what the process grew by at its peak.

Times are the best of the rounds, both sides in turn, in seconds of the process's own CPU time where one core is given
(other load does not count) and of the wall otherwise. Rows are JSON lines with device, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flax import nnx

from maxdiffusion.media.write import write, writing
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.models.vae import conv, model
from maxdiffusion.models.vae.config import VAEConfig
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.runtime.feed import feeding
from maxdiffusion.runtime.timing import host_peak
from maxdiffusion.runtime.versions import versions

CORES = len(os.sched_getaffinity(0))
clock = time.process_time if CORES == 1 else time.perf_counter


def row(**values: Any) -> None:
    print(json.dumps(values | {"cores": CORES} | versions()), flush=True)


def best(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first round warms up
        for name, run in runs.items():
            start = clock()
            jax.block_until_ready(run())
            times[name].append(clock() - start)
    return {name: min(each[1:]) for name, each in times.items()}


def official(**changes: Any) -> VAEConfig:
    z = changes.setdefault("z_dim", 16)
    return VAEConfig(latents_mean=(0.0,) * z, latents_std=(1.0,) * z, **changes)


def bench_conv(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(CORES)
    rng = np.random.default_rng(0)
    for c, side, frames in ((8, 96, 4), (16, 96, 4), (32, 48, 4), (96, 96, 4), (192, 48, 4), (384, 24, 2)):
        x = rng.standard_normal((1, frames + 2, side, side, c), np.float32)
        kernel = rng.standard_normal((3, 3, 3, c, c), np.float32)
        x_torch = torch.from_numpy(x).permute(0, 4, 1, 2, 3).contiguous()
        kernel_torch = torch.from_numpy(kernel).permute(4, 3, 0, 1, 2).contiguous()
        x_jax, kernel_jax = jnp.asarray(x), jnp.asarray(kernel)
        runs: dict[str, Callable[[], Any]] = {
            "torch": lambda x=x_torch, k=kernel_torch: torch.nn.functional.conv3d(
                torch.nn.functional.pad(x, (1, 1, 1, 1)), k
            )
        }
        for name, threshold in (("fold", 1 << 30), ("sum", 0)):
            conv._FOLD_BELOW = (
                threshold  # read while tracing, and jax remembers traces by function: a new one each time
            )
            compiled = jax.jit(lambda x, k: conv._conv3d_cpu(x, k)).lower(x_jax, kernel_jax).compile()
            runs[name] = lambda f=compiled, x=x_jax, k=kernel_jax: f(x, k)
        compiled = jax.jit(conv._conv3d_xla).lower(x_jax, kernel_jax).compile()
        runs["xla"] = lambda f=compiled, x=x_jax, k=kernel_jax: f(x, k)
        flop = 2 * 27 * c * c * side * side * frames
        rates = {name: round(flop / seconds / 1e9, 1) for name, seconds in best(runs, args.rounds).items()}
        row(what="conv3d 3x3x3", channels=c, pixels=f"{side}x{side}x{frames}", gflop_per_s=rates)


def bench_decode(args: argparse.Namespace) -> None:
    import diffusers
    import torch

    torch.set_num_threads(CORES)
    config = official(base_dim=args.base, num_res_blocks=args.res_blocks)
    rng = np.random.default_rng(0)

    def weight(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) / np.sqrt(max(1, np.prod(leaf.shape[:-1]))))

    graph, state = nnx.split(WanVAE(config))
    vae = nnx.merge(graph, jax.tree.map(weight, state))
    z = jnp.asarray(
        rng.standard_normal((1, (args.frames - 1) // 4 + 1, args.size // 8, args.size // 8, config.z_dim), np.float32)
    )
    theirs = diffusers.AutoencoderKLWan(base_dim=args.base, num_res_blocks=args.res_blocks).eval()
    z_torch = torch.from_numpy(np.array(z)).permute(0, 4, 1, 2, 3)
    start = clock()
    jax.block_until_ready(vae.decode(z, chunk=args.chunk))
    first = clock() - start

    @torch.no_grad()
    def decode_torch() -> Any:
        return theirs.decode(z_torch)

    times = best({"ours": lambda: vae.decode(z, chunk=args.chunk), "diffusers": decode_torch}, args.rounds)
    row(
        what="VAE decode",
        base_dim=args.base,
        pixels=f"{args.size}x{args.size}x{args.frames}",
        ours_s=round(times["ours"], 3),
        diffusers_s=round(times["diffusers"], 3),
        ratio=round(times["ours"] / times["diffusers"], 3),
        compile_s=round(first - times["ours"], 1),
        torch=torch.__version__,
        diffusers=diffusers.__version__,
    )


def bench_memory(args: argparse.Namespace) -> None:
    graph, state = nnx.split(WanVAE(official(), Dtypes(args.dtype, args.dtype)))
    for height, width in ((480, 832), (720, 1280)):
        z = jax.ShapeDtypeStruct((1, 1, height // 8, width // 8, 16), jnp.float32)
        _, cache = jax.eval_shape(lambda s, z: model._run(graph, s, "decode", None, z), state, z)
        start = clock()
        compiled = model.program(later=True).lower(graph, state, "decode", cache, z).compile()
        seconds, memory = clock() - start, compiled.memory_analysis()
        gib = {
            "weights": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
            "cache": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)),
            "temporaries": memory.temp_size_in_bytes,
        }
        row(
            what="one latent frame of decode, steady state",
            pixels=f"{width}x{height}x4",
            dtype=args.dtype,
            gib={name: round(size / 2**30, 2) for name, size in gib.items()},
            compile_s=round(seconds, 1),
        )


def bench_write(args: argparse.Namespace) -> None:
    height, width = args.size
    y, x = np.mgrid[:height, : width + args.frames]
    wide = np.stack([x % 240, y % 240, (x + y) % 240], -1).astype(np.uint8)
    wide += np.random.default_rng(0).integers(0, 16, wide.shape, np.uint8)

    def chunks(seconds: float) -> Iterator[np.ndarray]:
        for first in range(0, args.frames, 4):
            time.sleep(seconds)
            yield np.stack([wide[:, n : n + width] for n in range(first, min(first + 4, args.frames))])

    def decode() -> None:
        for _ in chunks(args.seconds):
            pass

    def after() -> None:
        frames = np.concatenate(list(chunks(args.seconds)))
        write(frames, folder / "after.mp4", 16, "mp4", {})

    def beside() -> None:
        with writing(folder / "beside.mp4", 16, "mp4", {}) as encode, feeding(encode) as put:
            for chunk in chunks(args.seconds):
                put(chunk)

    def encode_alone() -> None:
        write(chunks(0), folder / "alone.mp4", 16, "mp4", {})

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for run in (decode, encode_alone, after, beside):
            receive, send = multiprocessing.Pipe(False)
            process = multiprocessing.get_context("fork").Process(target=_measured, args=(run, send))
            process.start()
            seconds, grown = receive.recv()
            process.join()
            pixels = f"{width}x{height}x{args.frames}"
            row(what=run.__name__, pixels=pixels, seconds=round(seconds, 2), host_mb=round(grown / 1e6))


def _measured(run: Callable[[], None], send: Any) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = host_peak(), time.perf_counter()
    run()
    send.send((time.perf_counter() - start, host_peak() - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("conv").set_defaults(run=bench_conv)
    decode = commands.add_parser("decode")
    decode.add_argument("--base", type=int, default=96)
    decode.add_argument("--res-blocks", type=int, default=2)
    decode.add_argument("--size", type=int, default=64)
    decode.add_argument("--frames", type=int, default=5)
    decode.add_argument("--chunk", type=int, help="latent frames of one program; default: by memory")
    decode.set_defaults(run=bench_decode)
    memory = commands.add_parser("memory")
    memory.add_argument("--dtype", default="float32")
    memory.set_defaults(run=bench_memory)
    writes = commands.add_parser("write")
    writes.add_argument("--size", type=int, nargs=2, default=(720, 1280), help="height and width")
    writes.add_argument("--frames", type=int, default=81)
    writes.add_argument("--seconds", type=float, default=0.15, help="of four frames")
    writes.set_defaults(run=bench_write)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
