"""A process that compiles one stage of a run: `python -m maxdiffusion.planning.worker`, a job on stdin, a stage on stdout.

It lives no longer than the process that started it, which holds its stdin open: at its end all that was begun here ends,
and the temporary folder that was given to it goes.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from typing import Any

import pydantic

from maxdiffusion.config import Config
from maxdiffusion.errors import UserError
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
    sys.stdin.buffer.read()
    if os.getpgrp() == os.getpid():  # else somebody runs this by hand
        shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)
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

    from maxdiffusion.planning import predict, schedule
    from maxdiffusion.planning.chips import slice_of
    from maxdiffusion.planning.programs import programs
    from maxdiffusion.runtime import compile_cache
    from maxdiffusion.weights.official import configs_of

    compile_cache.enable(None)  # not even asked: its key would be that of a program for other devices
    tpu = slice_of(job.slice) if job.slice else None
    configs = configs_of(cfg)
    found: list[Program] = []
    fault = ""
    for each in programs(cfg, configs, tpu.described() if tpu else jax.devices()):
        if each.stage != job.stage:
            continue
        begun = time.monotonic()
        try:
            compiled = each.lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if (needed := _needed(str(error))) is None:
                raise
            fault = f"the compiler says that {each.name} needs {needed:.2f} GiB"
            gib, seconds = needed + each.resident / GIB, Seconds()
        else:
            memory = compiled.memory_analysis()
            gib = (memory.peak_memory_in_bytes + each.resident) / GIB
            seconds = Seconds()
            if tpu:
                read = schedule.read(compiled)
                made = predict.predict(read, tpu.generation, taken=_taken(configs["transformer"]))
                parts = made.parts
                seconds = Seconds(
                    parts.kernels, parts.linear, parts.other, parts.exposed, parts.hidden, made.low, made.high
                )
        found.append(
            Program(each.name, each.times, gib, seconds, 0.0, time.monotonic() - begun)
        )
    fits = all((program.gib or 0.0) <= job.gib for program in found)
    return Answer(stage=Stage("compiled", tuple(found), fits, fault))
