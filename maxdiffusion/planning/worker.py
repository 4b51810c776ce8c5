"""What a process of the pool does: compiles one stage of a run, or tells this machine's devices."""

from __future__ import annotations

import os
import re
import time
from typing import Any

import jax
import pydantic

from maxdiffusion.errors import UserError
from maxdiffusion.hardware.chips import Slice, slice_of
from maxdiffusion.planning import cache, predict, schedule
from maxdiffusion.planning.cache import Cache
from maxdiffusion.planning.results import Answer, Program, Stage
from maxdiffusion.programs import Program as RunProgram
from maxdiffusion.programs import programs
from maxdiffusion.request import Job
from maxdiffusion.request.cost import Seconds
from maxdiffusion.request.nets import read_configs
from maxdiffusion.request.session import Setup
from maxdiffusion.runtime import compile_cache

GIB = 2**30
# Programs by stage; `text` is conditioning as a whole.
STAGES = {"text": ("image", "encode", "text"), "denoise": ("prepare", "step"), "decode": ("decode",)}


class Compiled(pydantic.BaseModel, extra="forbid"):
    """What the compiler said of a program, or why it refused it, as the cache keeps it."""

    gib: float = pydantic.Field(ge=0)
    seconds: Seconds
    fault: str
    refused: str


def devices() -> dict[str, Any]:
    """Platform, kind and number of this machine's devices, and GiB of each; a CPU's share of what the machine has."""
    device, count = jax.devices()[0], jax.device_count()
    stats = device.memory_stats() or {}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    gib = stats.get("bytes_limit", memory) / GIB
    return {"platform": device.platform, "kind": device.device_kind, "devices": count, "gib": gib}


def compile_stage(job: Job, stage: str, topology: str | None, gib: float) -> Answer:
    """Compiles the programs of a stage.

    Args:
      job: the run on its split.
      stage: a key of `STAGES`.
      topology: of a TPU slice; None is this machine's own devices.
      gib: memory of a device.
    """
    compile_cache.enable(None)  # it keeps nothing of programs for devices that are not here
    tpu = slice_of(topology) if topology else None
    store, unkept = Cache(job.cfg.jax_cache_dir), ""
    made: list[Program] = []
    faults: list[str] = []
    try:
        setup = Setup.of(job, read_configs(job.cfg), tpu.described() if tpu else jax.devices())
        network = setup.configs["transformer"]
        probability = len(network.adapter_layers) / network.num_layers
        for each in programs(setup):
            if each.name not in STAGES[stage]:
                continue
            name = cache.program(each.name, each.lowered.as_text(), topology or str(jax.devices()))
            begun = time.monotonic()
            compiled = store.read(name, Compiled.model_validate_json)
            if compiled is None:
                compiled = _compile(each, tpu, probability)
                unkept = store.write(name, compiled.model_dump_json().encode()) or unkept
            if compiled.refused:
                raise UserError(f"The compiler refuses the program {each.name}: {compiled.refused}")
            faults += [compiled.fault] if compiled.fault else []
            took = time.monotonic() - begun
            made.append(Program(each.name, each.times, compiled.gib + each.resident / GIB, compiled.seconds, took))
    except UserError as error:
        return Answer(refused=str(error), unkept=unkept)
    fits = all(program.gib <= gib for program in made)
    return Answer(Stage("compiled", tuple(made), fits, "; ".join(faults)), unkept=unkept)


def _compile(program: RunProgram, tpu: Slice | None, branch_probability: float) -> Compiled:
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
    memory: Any = compiled.memory_analysis()
    found, fault = predict.Prediction(Seconds()), ""
    if tpu:
        found = predict.predict(schedule.read(compiled), tpu.generation, branch_probability=branch_probability)
    if found.uncounted:
        fault = f"the time of the kernels {', '.join(found.uncounted)} in {program.name} is not known and not in it"
    return Compiled(gib=memory.peak_memory_in_bytes / GIB, seconds=found.seconds, fault=fault, refused="")


def _needed(message: str) -> float | None:
    """GiB that a program needs which the compiler refuses for want of memory; None where it refuses for another reason.

    RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.26G) exceeds ...
    """
    found = re.search(r"HBM, .*?\(([\d.]+)([KMGT])\) exceeds|hbm\. Used ([\d.]+)([KMGT]) of", message, re.DOTALL)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    number, unit = [group for group in found.groups() if group]
    return float(number) * 1024.0 ** ("KMGT".index(unit) - 2)
