"""Host memory and speed of loading each net of a checkpoint (Linux; one line of JSON for each net).

    python scripts/make_random_checkpoint.py /tmp/wan --preset 1.3b --dtype fp32
    python scripts/measure_load.py /tmp/wan --weights-dtype bfloat16
    python scripts/measure_load.py /tmp/wan --nets transformer --lora-rank 64

With `--lora-rank` the transformer is loaded once more, merged with a random LoRA of all linear layers of its blocks.
`extra_mb` is the peak resident memory less what was there before and, on the CPU, less the parameters that stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.weights import mapping
from maxdiffusion.weights.checkpoint import Checkpoint, open_checkpoint
from maxdiffusion.weights.lora.file import read
from maxdiffusion.weights.lora.merge import merge
from maxdiffusion.weights.nets import Nets, builders


def memory(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def measure(nets: Nets, name: str) -> dict[str, object]:
    tensors: list[int] = []
    gc.collect()  # the net before this one
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    net = nets.load(name, tensors.append)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    kept = sum(param.get_value().nbytes for param in mapping.parameters(net).values())
    on_host = kept if jax.default_backend() == "cpu" else 0
    return {
        "net": name,
        "device": jax.devices()[0].device_kind,
        "disk_mb": round(sum(tensors) / 1e6, 1),
        "parameters_mb": round(kept / 1e6, 1),
        "largest_tensor_mb": round(max(tensors) / 1e6, 1),
        "before_mb": round(before / 1e6, 1),
        "extra_mb": round((memory("VmHWM") - before - on_host) / 1e6, 1),
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
    }


def write_lora(shapes: Mapping[str, tuple[int, ...]], rank: int, file: Path) -> None:
    """Writes a LoRA of random numbers in bf16 for the linear layers of the blocks among these tensors."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            for part, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                numbers = 0.01 * rng.standard_normal(size, np.float32)
                tensors[f"{name.removesuffix('.weight')}.lora_{part}.weight"] = numbers.astype(ml_dtypes.bfloat16)
    save_file(tensors, file)


def with_lora(checkpoint: Checkpoint, rank: int, file: Path) -> Checkpoint:
    """The checkpoint, its transformer merged with a LoRA that another process writes, whose memory is not counted."""
    net = checkpoint.nets["transformer"]
    shapes = {name: tensor.shape for name, tensor in net.tensors.items()}
    writer = multiprocessing.get_context("spawn").Process(target=write_lora, args=(shapes, rank, file))
    writer.start()
    writer.join()
    merged, each = merge(net.tensors, net.config, read(file), 1.0)
    print(each)
    nets = {**checkpoint.nets, "transformer": dataclasses.replace(net, tensors=merged, loras=(each,))}
    return dataclasses.replace(checkpoint, nets=nets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights-dtype", default="bfloat16")
    parser.add_argument("--nets", nargs="+", default=["text_encoder", "transformer", "vae"])
    parser.add_argument("--lora-rank", type=int)
    args = parser.parse_args()
    build = builders(AttentionPlan(), weights_dtype=args.weights_dtype, dtype=args.weights_dtype)
    checkpoint = open_checkpoint(args.folder)
    nets = Nets(checkpoint, build)
    jax.block_until_ready(jnp.zeros(1))  # the backend's own memory belongs to `before`
    for name in args.nets:
        print(json.dumps(measure(nets, name)), flush=True)
    if args.lora_rank:
        with tempfile.TemporaryDirectory() as folder:
            nets = Nets(with_lora(checkpoint, args.lora_rank, Path(folder) / "lora.safetensors"), build)
            print(json.dumps(measure(nets, "transformer")), flush=True)


if __name__ == "__main__":
    main()
