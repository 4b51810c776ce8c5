"""`inspect=true`: the variant and networks of a checkpoint, and whether it would load, from its headers alone."""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Mapping, Sequence

from maxdiffusion import variants
from maxdiffusion.errors import UserError
from maxdiffusion.request import Job, loras
from maxdiffusion.request.nets import builders, open_checkpoint
from maxdiffusion.weights import naming, net_file
from maxdiffusion.weights.sources import TensorSource


def run(job: Job) -> None:
    """Prints the variant, then each network's naming, dtypes, size and parameters, then their sizes in memory.

    Nothing is fetched or loaded and no device is touched. The first two need no jax and appear within a second; the
    check against the networks, strict as that of a run, follows once jax is imported.

    Raises:
      UserError: the checkpoint would not load; it names the missing and the unknown tensors of each network.
    """
    spec, checkpoint = job.spec, open_checkpoint(job, fetch=False)
    dims = variants.Dims.of(vars(checkpoint.configs["transformer"]))
    print(f"{spec.name} ({spec.model_type}): {dims}\n{checkpoint.folder}", flush=True)
    rows = [("net", "names", "stored as", "on disk", "parameters", "file")]
    for name, net in checkpoint.nets.items():
        names = "original" if naming.is_original(net.tensors) else "diffusers"
        size = sum(tensor.nbytes for tensor in net.tensors.values())
        count = sum(math.prod(tensor.shape) for tensor in net.tensors.values())
        where = str(net.path).removeprefix(f"{checkpoint.folder}/")
        where += f" (unused: {net_file.listed(net.left)})" if net.left else ""
        rows.append((name, names, _dtypes(net.tensors), _size(size), f"{count / 1e6:,.1f} M", where))
    print(_table(rows), flush=True)
    for name, net in loras.merged(job, checkpoint, fetch=False).nets.items():
        for each in net.loras:
            print(f"LoRA of the {name}: {each}", flush=True)

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from maxdiffusion.attention.plan import AttentionPlan
    from maxdiffusion.weights import nets

    build = builders(job.cfg, AttentionPlan())
    faults, memory = [], []
    for name in checkpoint.nets:
        try:
            abstract, assignments = nets.matched(checkpoint, name, build[name])
        except UserError as error:
            faults.append(str(error))
        else:
            memory.append(f"{name} {_size(nets.size(abstract)[1])}")
            if said := nets.quantized(abstract, assignments):
                print(f"{name}: {said}")
    print(f"in memory, in the configured dtypes: {', '.join(memory)}")
    if faults:
        raise UserError("\nerror: ".join(faults))
    print("every parameter has its tensor and every tensor its parameter")


def _dtypes(tensors: Mapping[str, TensorSource]) -> str:
    """The dtypes with their shares of the numbers, the largest first: `F8_E4M3 scaled 97 %, F16 3 %`."""
    counts: collections.Counter[str] = collections.Counter()
    for tensor in tensors.values():
        counts[tensor.stored_as] += math.prod(tensor.shape)
    if len(counts) == 1:
        return next(iter(counts))
    total = max(sum(counts.values()), 1)
    return ", ".join(f"{dtype} {100 * count / total:.3g} %" for dtype, count in counts.most_common())


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(map(str.rstrip, lines))
