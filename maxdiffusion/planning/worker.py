"""The functions that the pool's processes run: one compiles a stage of a run, one describes this machine's devices."""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

import jax
import pydantic

from maxdiffusion.errors import UserError
from maxdiffusion.hardware.chips import Slice
from maxdiffusion.planning import cache, predict, schedule
from maxdiffusion.planning.cache import Cache
from maxdiffusion.planning.results import Stage, Target
from maxdiffusion.programs import Program, programs
from maxdiffusion.request import Job
from maxdiffusion.request.cost import Figures, Seconds
from maxdiffusion.request.nets import read_configs
from maxdiffusion.request.session import Setup
from maxdiffusion.runtime import compile_cache, distributed, memory

GIB = 2**30
# Programs by stage; `text` is conditioning as a whole.
STAGES = {"text": ("image", "encode", "audio", "text"), "denoise": ("prepare", "step"), "decode": ("decode",)}


class Compiled(pydantic.BaseModel, extra="forbid"):
    """The compiler's figures of a program, or why it refused it, as the cache keeps them."""

    gib: float = pydantic.Field(ge=0)
    seconds: Seconds
    fault: str
    refused: str


class Answer(NamedTuple):
    """The result of `compile_stage`.

    Attributes:
      stage: None where the split is refused.
      refused: why.
      unkept: why a program's figures are not kept for the next plan; empty where all are.
      took: seconds of compiling.
    """

    stage: Stage | None
    refused: str = ""
    unkept: str = ""
    took: float = 0.0


def devices() -> Target:
    """The devices of this machine; the memory of a CPU device is its share of the machine's."""
    found = distributed.devices()
    device, count = found[0], len(found)
    return Target(None, device.platform, device.device_kind, count, memory.per_device() / GIB)


def compile_stage(job: Job, stage: str, target: Target) -> Answer:
    """Compiles the programs of a stage, a key of `STAGES`, of a run on its split."""
    compile_cache.enable(None)  # jax caches no programs for absent devices
    tpu, store, unkept, took = target.slice, Cache(job.cfg.jax_cache_dir), "", 0.0
    made: list[Figures] = []
    faults: list[str] = []
    try:
        setup = Setup.of(job, read_configs(job), tpu.describe() if tpu else jax.devices())
        network = setup.configs["transformer"]
        probability = len(network.adapter_layers) / network.num_layers
        for each in programs(setup):
            if each.name not in STAGES[stage]:
                continue
            name = cache.program(each.name, each.lowered.as_text(), tpu.topology if tpu else str(jax.devices()))
            begun = time.monotonic()
            compiled = store.read(name, Compiled)
            if compiled is None:
                compiled = _compile(each, tpu, probability)
                unkept = store.write(name, compiled) or unkept
            took += time.monotonic() - begun
            if compiled.refused:
                raise UserError(f"The compiler refuses the program {each.name}: {compiled.refused}")
            faults += [compiled.fault] if compiled.fault else []
            made.append(Figures(each.name, each.times, compiled.gib + each.resident / GIB, compiled.seconds))
    except UserError as error:
        return Answer(None, str(error), unkept)
    found = Stage("compiled", tuple(made), all(each.gib <= target.gib for each in made), "; ".join(faults))
    return Answer(found, "", unkept, took)


def _compile(program: Program, tpu: Slice | None, branch_probability: float) -> Compiled:
    """`branch_probability` is the share of the transformer's layers that an adapter adds to: a branch in its loop."""
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        needed = _needed(said)
        if needed is None:
            return Compiled(gib=0, seconds=Seconds(), fault="", refused=said[:400])
        fault = f"the compiler says that {program.name} needs {needed:.2f} GiB"
        return Compiled(gib=needed, seconds=Seconds(), fault=fault, refused="")
    used: Any = compiled.memory_analysis()
    seconds, fault = Seconds(), ""
    if tpu:
        seconds, uncounted = predict.predict(
            schedule.steps(compiled.as_text() or ""), tpu.generation, branch_probability=branch_probability
        )
        if uncounted:
            fault = f"the time of the kernels {', '.join(uncounted)} in {program.name} is not known and not in it"
    return Compiled(gib=used.peak_memory_in_bytes / GIB, seconds=seconds, fault=fault, refused="")


def _needed(message: str) -> float | None:
    """GiB that a program needs where the compiler refuses it for lack of memory, else None.

    RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.26G) exceeds ...
    """
    found = re.search(r"HBM, .*?\(([\d.]+)([KMGT])\) exceeds|hbm\. Used ([\d.]+)([KMGT]) of", message, re.DOTALL)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    number, unit = [group for group in found.groups() if group]
    return float(number) * 1024.0 ** ("KMGT".index(unit) - 2)
