"""A process that compiles one stage of a run: a job on stdin, the answer on stdout.

It lives no longer than the process that started it, which holds its stdin open: at its end all that was begun here
ends, and the temporary folder that was given to it goes.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pydantic

from maxdiffusion.config import Config
from maxdiffusion.errors import UserError
from maxdiffusion.planning import predict, schedule
from maxdiffusion.planning.chips import Slice, slice_of
from maxdiffusion.planning.results import Program, Seconds, Stage

GIB = 2**30


class Job(pydantic.BaseModel):
    """What is to be compiled.

    Attributes:
      config: a `Config`, as JSON.
      stage: of `results.STAGES`.
      slice: the name of a TPU slice; None is this machine's own devices.
      gib: memory of a device, in GiB.
    """

    config: dict[str, Any]
    stage: str
    slice: str | None
    gib: float


class Answer(pydantic.BaseModel):
    """One of: the stage, the sentence that refuses it, what this machine's devices are."""

    stage: Stage | None = None
    refused: str | None = None
    devices: dict[str, Any] | None = None


def main() -> None:
    """Does the job."""
    given, out = sys.stdin.buffer.readline(), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = _do(Job.model_validate_json(given)) if given.strip() else Answer(devices=_here())
    except UserError as error:
        answer = Answer(refused=str(error))
    out.write(answer.model_dump_json().encode())
    out.flush()


def _end_with_parent() -> None:
    while os.read(0, 1):  # not of sys.stdin, which a thread would hold when Python ends
        pass
    if os.getpgrp() == os.getpid():  # else somebody runs this by hand
        folder = Path(tempfile.gettempdir())
        for _ in range(1000):  # as long as another thread still adds to it
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
        os.killpg(0, signal.SIGKILL)


def _here() -> dict[str, Any]:
    """Platform, kind and number of this machine's devices, and GiB of each; a CPU's share of what the machine has."""
    import jax

    device, count = jax.devices()[0], jax.device_count()
    stats = device.memory_stats() or {}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    gib = stats.get("bytes_limit", memory) / GIB
    return {"platform": device.platform, "kind": device.device_kind, "devices": count, "gib": gib}


def _do(job: Job) -> Answer:
    cfg = Config.model_validate(job.config)
    import jax

    from maxdiffusion.planning.programs import programs
    from maxdiffusion.runtime import compile_cache
    from maxdiffusion.weights.official import configs_of

    compile_cache.enable(None)  # it keeps nothing of programs for devices that are not here
    tpu = slice_of(job.slice) if job.slice else None
    configs = configs_of(cfg)
    side = getattr(configs["transformer"], "side", None)
    taken = len(getattr(side, "vace_layers", ())) / configs["transformer"].num_layers
    found: list[Program] = []
    faults: list[str] = []
    for each in programs(cfg, configs, tpu.described() if tpu else jax.devices()):
        if each.stage != job.stage:
            continue
        begun = time.monotonic()
        seconds = Seconds()
        try:
            compiled = each.lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            said = str(error)
            needed = _needed(said)
            if needed is None:
                return Answer(refused=f"The compiler refuses the program {each.name}: {' '.join(said.split())[:400]}")
            faults.append(f"the compiler says that {each.name} needs {needed:.2f} GiB")
        else:
            memory: Any = compiled.memory_analysis()
            needed = memory.peak_memory_in_bytes / GIB
            if tpu:
                seconds = _seconds(schedule.read(compiled), tpu, taken, faults)
        took = time.monotonic() - begun
        found.append(Program(each.name, each.times, needed + each.resident / GIB, seconds, took))
    fits = all(program.gib <= job.gib for program in found)
    return Answer(stage=Stage("compiled", tuple(found), fits, "; ".join(faults)))


def _seconds(read: schedule.Schedule, tpu: Slice, taken: float, faults: list[str]) -> Seconds:
    made = predict.predict(read, tpu.generation, taken=taken)
    if made.uncounted:
        faults.append(f"the time of the kernels {', '.join(made.uncounted)} is not known and not in it")
    parts = made.parts
    return Seconds(parts.kernels, parts.linear, parts.other, parts.exposed, parts.hidden, made.low, made.high)


def _needed(message: str) -> float | None:
    """GiB that a program needs which the compiler refuses for want of memory; None where it refuses for another reason.

    RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.26G) exceeds ...
    """
    found = re.search(r"HBM, .*?\(([\d.]+)([KMGT])\) exceeds|hbm\. Used ([\d.]+)([KMGT]) of", message, re.DOTALL)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    number, unit = [group for group in found.groups() if group]
    return float(number) * 1024.0 ** ("KMGT".index(unit) - 2)


if __name__ == "__main__":
    main()
