"""Memory and predicted time of a run's programs, compiled for a TPU slice that need not be there.

    python scripts/tpu_memory.py v6e:2x4 configs/wan2.1_t2v_14b.yml attention=ulysses_ring ulysses_shards=4
    python scripts/tpu_memory.py TPU7x:2x2x1 configs/wan2.1_t2v_14b.yml --layers 1 --programs step --hlo step.txt

Needs libtpu (`pip install libtpu`, x86-64 Linux), but no TPU and no checkpoint: weights, inputs and shardings of a run
are described and its programs compiled from that; nothing is allocated. `text` is the text encoder on 512 tokens,
`image` the image encoder, `prepare` what these give every step, `step` one denoise step, `decode` and `encode` the
VAE's chunks: the first, and where there are several one of the others. What is in memory beside a program (the other
expert of two, an input video) is counted as resident. A step takes one to three minutes, however many layers it has.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from maxdiffusion.hardware.chips import compile_only, slice_of
from maxdiffusion.planning.predict import predict
from maxdiffusion.planning.schedule import read

if TYPE_CHECKING:
    from maxdiffusion.planning.programs import Lowered

PROGRAMS = ("image", "encode", "text", "prepare", "step", "decode")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology", help="such as v5e:2x4, v6e:4x4, v5p:2x2x2, TPU7x:2x2x1")
    parser.add_argument("config", nargs="+", help="a YAML file and key=value words, as for generate_wan.py")
    parser.add_argument("--layers", type=int, help="of the transformer and the encoders; default: all")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--hlo", type=Path, help="write the scheduled program here (of several: the last)")
    args = parser.parse_intermixed_args(argv)
    for program, seconds, compiled in compile_all(args.topology, args.config, args.programs, args.layers):
        memory = compiled.memory_analysis()
        peak = memory.peak_memory_in_bytes + program.resident
        print(f"{program.name:<8} {gib(peak)} GiB per device at its peak, arguments"
              f" {gib(memory.argument_size_in_bytes)}, temporaries {gib(memory.temp_size_in_bytes)}, resident"
              f" {gib(program.resident)}; compiled in {seconds:.0f} s", flush=True)  # fmt: skip
        print(f"{'':<8} {predicted(compiled, args.topology, program.taken)}", flush=True)
        if args.hlo:
            args.hlo.write_text(compiled.as_text())


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:6.2f}"


def predicted(compiled: Any, topology: str, taken: float) -> str:
    """Time of a call, and its parts."""
    parts = dataclasses.asdict(predict(read(compiled), slice_of(topology).generation, taken=taken).seconds)
    low, high = parts.pop("low"), parts.pop("high")
    shown = ", ".join(f"{name} {seconds:.3f}" for name, seconds in parts.items())
    return f"predicted {low:.3f} to {high:.3f} s: {shown}"


def topology_devices(topology: str) -> list[Any]:
    """The devices of a slice, described by libtpu; to be called before jax is imported elsewhere."""
    os.environ |= compile_only(topology)
    return slice_of(topology).described()


def compile_all(
    topology: str, words: list[str], names: tuple[str, ...], layers: int | None
) -> Iterator[tuple[Lowered, float, Any]]:
    """(program, seconds, jax.stages.Compiled) of each program of these names."""
    devices = topology_devices(topology)
    from maxdiffusion.planning.programs import programs, shallow

    from maxdiffusion import config
    from maxdiffusion.weights import official

    cfg = config.load([*words, "prompt=a cat", "jax_cache_dir="])
    configs = official.configs_of(cfg)
    for program in programs(cfg, shallow(configs, layers) if layers else configs, devices):
        if program.name in names:
            lowered, start = program.lowered, time.perf_counter()
            compiled = lowered.compile()
            yield program, time.perf_counter() - start, compiled


if __name__ == "__main__":
    main()
