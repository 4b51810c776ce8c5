"""Memory per device of a run's programs, compiled for a TPU slice that need not be there.

    python scripts/tpu_memory.py v6e:2x4 configs/wan2.1_t2v_14b.yml attention=ulysses_ring ulysses_shards=4
    python scripts/tpu_memory.py TPU7x:2x2x1 configs/wan2.1_t2v_14b.yml --layers 1 --programs step --hlo step.txt

Needs libtpu (`pip install libtpu`, x86-64 Linux), but no TPU and no checkpoint: weights, inputs and shardings of a run
are described and its programs compiled from that; nothing is allocated. `text` is the text encoder on 512 tokens,
`prepare` what the text gives every step, `step` one denoise step by the same `Denoiser` as in a run, `decode` and
`encode` the VAE's chunk after the first. A step takes one to three minutes, however many layers it has.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tpu_schedule

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# The published checkpoints: transformer, and for all of them text encoder and VAE.
_LATENTS = {"in_channels": 16, "out_channels": 16, "text_dim": 4096, "attention_head_dim": 128}
TRANSFORMERS = {
    "wan2.1-t2v-1.3b": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960, **_LATENTS},
    "wan2.1-t2v-14b": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824, **_LATENTS},
}
TEXT_ENCODER = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
VAE = {"latents_mean": (0.0,) * 16, "latents_std": (1.0,) * 16}

PROGRAMS = ("text", "prepare", "step", "decode", "encode")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology", help="such as v5e:2x4, v6e:4x4, v5p:2x2x2, TPU7x:2x2x1")
    parser.add_argument("config", nargs="+", help="a YAML file and key=value words, as for generate_wan.py")
    parser.add_argument("--layers", type=int, help="of the transformer and the text encoder; default: all")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--hlo", type=Path, help="write the scheduled program here (of several: the last)")
    args = parser.parse_intermixed_args(argv)
    for row in compile_all(args.topology, args.config, args.programs, args.layers):
        name, seconds, compiled = row
        memory = compiled.memory_analysis()
        print(f"{name:<8} {gib(memory.peak_memory_in_bytes)} GiB per device at its peak, arguments"
              f" {gib(memory.argument_size_in_bytes)}, temporaries {gib(memory.temp_size_in_bytes)};"
              f" compiled in {seconds:.0f} s", flush=True)  # fmt: skip
        if args.hlo:
            args.hlo.write_text(compiled.as_text())


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:6.2f}"


def topology_devices(topology: str) -> list[Any]:
    """The devices of a slice, described by libtpu; to be called before jax is imported elsewhere."""
    os.environ |= tpu_schedule.compile_only(topology)
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def compile_all(topology: str, words: list[str], programs: tuple[str, ...], layers: int | None):
    """Yields (program, seconds, jax.stages.Compiled) for each of `programs`."""
    devices = topology_devices(topology)
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from maxdiffusion import config, parallel, variants
    from maxdiffusion.conditioning import text
    from maxdiffusion.config.examples import examples
    from maxdiffusion.denoise import experts, sampling
    from maxdiffusion.denoise.guidance import Contexts, NoGuidance, choose
    from maxdiffusion.denoise.loop import Denoiser
    from maxdiffusion.denoise.network import split
    from maxdiffusion.denoise.solvers import SOLVERS
    from maxdiffusion.models.dit import Context, DiTConfig
    from maxdiffusion.models.umt5 import UMT5Config
    from maxdiffusion.models.vae import VAEConfig
    from maxdiffusion.models.vae import model as vae_model
    from maxdiffusion.parallel import axes, startup
    from maxdiffusion.weights.loader import placed
    from maxdiffusion.weights.nets import build_abstractly, builders_of

    cfg = config.load([*words, "prompt=a cat", "jax_cache_dir="])
    spec = variants.get(cfg.model_name)
    configs = {
        "transformer": DiTConfig(**TRANSFORMERS[spec.name] | ({"num_layers": layers} if layers else {})),
        "text_encoder": UMT5Config(**TEXT_ENCODER | ({"num_layers": layers} if layers else {})),
        "vae": VAEConfig(**VAE),
    }
    shape = (*spec.latent_grid(cfg.num_frames, cfg.height, cfg.width), configs["vae"].z_dim)
    network = configs["transformer"]
    tokens = math.prod(network.grid(*shape[:3]))
    plan, placement = startup.place(cfg, network.num_attention_heads, network.attention_head_dim, tokens, devices)
    build = builders_of(cfg, plan)
    nets = {name: placed(build_abstractly(build[name], configs[name]), placement) for name in configs}

    def array(shape: tuple[int, ...], dtype: Any, *logical: str | None) -> jax.ShapeDtypeStruct:
        names = [placement.dividing(name, size) for name, size in zip(logical, shape, strict=False)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding(*names))

    def described(compiled: Any, of: Callable[..., Any], *given: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(of, *given),
            compiled.output_shardings,
        )

    with parallel.use(placement):
        size = min(len(examples(cfg)), cfg.per_device_batch_size * parallel.data_degree())
        options = parallel.compiler_options()

        def timed(name: str, make: Callable[[], Any]) -> tuple[str, float, Any]:
            start = time.perf_counter()
            compiled = make()
            return name, time.perf_counter() - start, compiled

        if "text" in programs:
            ids, valid = (
                array((1, text.MAX_LENGTH), jnp.int32, None, None),
                array((1, text.MAX_LENGTH), bool, None, None),
            )
            graph, params = nnx.split(nets["text_encoder"])
            lowered = jax.jit(functools.partial(text._run, graph)).lower(params, ids, valid)
            yield timed("text", lambda: lowered.compile(options))
        if "prepare" in programs or "step" in programs:
            transformer = nets["transformer"]
            network, params = split(transformer)
            context = Context(array((size, text.MAX_LENGTH, configs["transformer"].text_dim), jnp.float32))
            function = functools.partial(sampling._prepare, nnx.graphdef(transformer))
            prepare = timed("prepare", lambda: jax.jit(function).lower(params, context).compile(options))
            if "prepare" in programs:
                yield prepare
        if "step" in programs:
            one = described(prepare[2], function, params, context)
            solver = SOLVERS[cfg.solver]
            schedule = solver.schedule(cfg.num_inference_steps, cfg.flow_shift)
            segments = experts.SingleExpert(cfg.guidance_scale).segments(schedule.timesteps)
            per_shard = [tokens * -(-rows // parallel.data_degree()) for rows in (size, 2 * size)]
            guidance = choose(cfg.guidance_mode, [cfg.guidance_scale], *per_shard)
            contexts = Contexts(one, None if isinstance(guidance, NoGuidance) else one)
            denoiser = Denoiser(network, segments, schedule, solver, guidance, scan=cfg.loop == "scan")
            program = denoiser.compile(params, array((size, *shape), jnp.float32, axes.BATCH), contexts)
            (compiled,) = program.programs.values()
            yield "step", program.seconds, compiled
        vae = nets["vae"]
        graph, params = nnx.split(vae)
        frames, height, width, channels = shape
        latents = vae._chunks(frames, cfg.height, cfg.width, size, None)[-1]
        chunks = {
            "decode": (latents, height, width, channels),
            "encode": (latents * configs["vae"].temporal_factor, cfg.height, cfg.width, 3),
        }
        for name, chunk in chunks.items():
            if name in programs:
                x = array((size, *chunk), jnp.float32)
                given = (graph, params, name, vae_model._placement())
                cache = jax.tree.map(
                    lambda leaf: array(leaf.shape, leaf.dtype, axes.BATCH, None, None, axes.WIDTH, None),
                    vae_model._run.eval_shape(*given, None, x)[1],
                )
                lowered = vae_model._run.lower(*given, cache, x)
                yield timed(name, lambda lowered=lowered: lowered.compile())


if __name__ == "__main__":
    main()
