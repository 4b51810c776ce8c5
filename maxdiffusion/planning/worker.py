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

import jax
import pydantic

from maxdiffusion.config import Config
from maxdiffusion.errors import UserError
from maxdiffusion.hardware.chips import Slice, slice_of
from maxdiffusion.planning import cache, predict, schedule
from maxdiffusion.planning.cache import Cache
from maxdiffusion.planning.pool import Answer, Job
from maxdiffusion.planning.programs import Lowered, programs
from maxdiffusion.planning.results import Program, Seconds, Stage
from maxdiffusion.runtime import compile_cache
from maxdiffusion.weights.official import configs_of

GIB = 2**30


class Compiled(pydantic.BaseModel):
    """What is kept of a program: what the compiler said of it, or why it refused it."""

    gib: float = 0.0
    seconds: Seconds = Seconds()
    fault: str = ""
    refused: str = ""


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
    device, count = jax.devices()[0], jax.device_count()
    stats = device.memory_stats() or {}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    gib = stats.get("bytes_limit", memory) / GIB
    return {"platform": device.platform, "kind": device.device_kind, "devices": count, "gib": gib}


def _do(job: Job) -> Answer:
    cfg = Config.model_validate(job.config)
    compile_cache.enable(None)  # it keeps nothing of programs for devices that are not here
    tpu = slice_of(job.slice) if job.slice else None
    configs = configs_of(cfg)
    store = Cache(cfg.jax_cache_dir)
    made: list[Program] = []
    faults: list[str] = []
    for each in programs(cfg, configs, tpu.described() if tpu else jax.devices()):
        if each.stage != job.stage:
            continue
        name = cache.program(each.lowered.as_text(), each.options, tpu.topology if tpu else str(jax.devices()))
        begun = time.monotonic()
        compiled = store.read(name, Compiled.model_validate_json)
        if compiled is None:
            compiled = _compile(each, tpu)
            store.write(name, compiled.model_dump_json().encode())
        if compiled.refused:
            return Answer(refused=f"The compiler refuses the program {each.name}: {compiled.refused}")
        faults += [compiled.fault] if compiled.fault else []
        took = time.monotonic() - begun
        made.append(Program(each.name, each.times, compiled.gib + each.resident / GIB, compiled.seconds, took))
    fits = all(program.gib <= job.gib for program in made)
    return Answer(stage=Stage("compiled", tuple(made), fits, "; ".join(faults)))


def _compile(program: Lowered, tpu: Slice | None) -> Compiled:
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        needed = _needed(said)
        if needed is None:
            return Compiled(refused=said[:400])
        return Compiled(gib=needed, fault=f"the compiler says that {program.name} needs {needed:.2f} GiB")
    memory: Any = compiled.memory_analysis()
    gib = memory.peak_memory_in_bytes / GIB
    if tpu is None:
        return Compiled(gib=gib)
    found = predict.predict(schedule.read(compiled), tpu.generation, taken=program.taken)
    fault = ""
    if found.uncounted:
        fault = f"the time of the kernels {', '.join(found.uncounted)} in {program.name} is not known and not in it"
    return Compiled(gib=gib, seconds=found.seconds, fault=fault)


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
