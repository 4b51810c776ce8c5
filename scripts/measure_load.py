"""Host memory and speed of loading each net of a checkpoint (Linux; one line of JSON for each net).

    python scripts/make_random_checkpoint.py /tmp/wan --preset 1.3b --dtype fp32
    python scripts/measure_load.py /tmp/wan --weights-dtype bfloat16

`extra_mb` is the peak resident memory less what was there before and, on the CPU, less the parameters that stay.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.weights import mapping
from maxdiffusion.weights.checkpoint import open_checkpoint
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights-dtype", default="bfloat16")
    parser.add_argument("--nets", nargs="+", default=["text_encoder", "transformer", "vae"])
    args = parser.parse_args()
    build = builders(AttentionPlan(), weights_dtype=args.weights_dtype, dtype=args.weights_dtype)
    nets = Nets(open_checkpoint(args.folder), build)
    jax.block_until_ready(jnp.zeros(1))  # the backend's own memory belongs to `before`
    for name in args.nets:
        print(json.dumps(measure(nets, name)), flush=True)


if __name__ == "__main__":
    main()
