"""`plan=`: the splits of a TPU slice, or of this machine, that a run fits, with predicted time and memory."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.hardware.chips import Slice, slice_of
from maxdiffusion.planning import cache, picture, report
from maxdiffusion.planning.cache import Cache
from maxdiffusion.planning.pool import Pool, libtpu
from maxdiffusion.planning.results import Plan, Target
from maxdiffusion.request import Job, caching, cost, few_step, loras
from maxdiffusion.request.checks import required
from maxdiffusion.request.nets import read_configs
from maxdiffusion.runtime import log, paths
from maxdiffusion.runtime.atomic import atomic_path
from maxdiffusion.runtime.hosts import metadata

logger = logging.getLogger(__name__)


def run(job: Job, words: Sequence[str]) -> Plan:
    """Prints the plan of a run and writes `plan_file`; returns it.

    Args:
      job: the run.
      words: its command-line arguments.

    Raises:
      UserError: as `make`, a LoRA does not fit, or a file cannot be written.
    """
    cfg = job.cfg
    log.setup(cfg.log_level)
    loras.check_local(job)
    plan = make(job)
    said = {"plan", "plan_file", "plan_minutes", "price_per_chip_hour", "overwrite"}
    said |= {word.partition("=")[0] for row in plan.rows for word in row.overrides}
    plan = dataclasses.replace(plan, command=tuple(word for word in words if word.partition("=")[0] not in said))
    if cfg.lora or cfg.lora_2:  # not a part of the cached plan, which is the same without
        merged = "LoRA is merged into the weights while they load: it changes neither the memory nor the time of a step"
        plan = dataclasses.replace(plan, notes=(*plan.notes, merged))
    print(report.text(plan, cfg.price_per_chip_hour))
    for file in map(paths.parse, cfg.plan_file):
        if file.suffix.lower() == ".svg":
            content = picture.svg(plan)
        else:
            content = json.dumps(report.as_json(plan, cfg.price_per_chip_hour), indent=1) + "\n"
        with atomic_path(file, cfg.overwrite) as path:
            path.write_text(content, encoding="utf-8")
        logger.info("wrote %s", file)
    return plan


def make(job: Job) -> Plan:
    """The plan, compiled within `plan_minutes` or read from the cache, which needs no jax.

    Raises:
      UserError: the run is illegal on every split, the devices do not exist, nothing can be compiled here.
    """
    images = {"image", "last_image"} & set(required(job.cfg, job.spec))
    missing: Any = dict.fromkeys((key for key in images if not getattr(job.cfg, key)), "of any content")
    job = dataclasses.replace(job, videos=tuple(dataclasses.replace(video, **missing) for video in job.videos))
    cfg = job.cfg
    deadline = time.monotonic() + 60 * cfg.plan_minutes
    name = cfg.plan
    if name == "auto":  # without opening the devices, which another process may hold
        name = os.environ.get("TPU_ACCELERATOR_TYPE") or metadata("accelerator-type")
    if not name:
        raise UserError(
            "plan=auto finds no TPU here; name a slice, such as plan=v6e-8, or write plan=here for this machine's own "
            "devices."
        )
    tpu = None if name == "here" else slice_of(name)
    configs = read_configs(job)
    store = Cache(cfg.jax_cache_dir)
    variables = sorted(each for each in os.environ.items() if each[0].startswith(("JAX_", "XLA_", "CUDA_", "TPU_")))
    asked = cache.asked(job, configs, tpu.topology if tpu else (platform.node(), variables))
    plan = store.read(asked, Plan)
    if plan is None:
        plan, whole = _make(job, configs, tpu, deadline)
        if whole and (unkept := store.write(asked, plan)):  # the next call completes a partial plan
            logger.warning("this plan is not kept for later calls: %s", unkept)
    return plan


def _make(job: Job, configs: Mapping[str, Any], tpu: Slice | None, deadline: float) -> tuple[Plan, bool]:
    """The plan, and whether all its programs were compiled."""
    pool = Pool(tpu.environment if tpu else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, deadline)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process, which compiles nothing
    from maxdiffusion.denoise.experts import described
    from maxdiffusion.planning import worker
    from maxdiffusion.planning.changes import nearest
    from maxdiffusion.planning.compilation import Compilation
    from maxdiffusion.planning.splits import splits
    from maxdiffusion.request.session import recipe_of

    target = (
        Target(tpu, "tpu", tpu.generation.kind, tpu.devices, tpu.generation.gib) if tpu else pool.do(worker.devices)
    )
    if target is None:
        raise UserError("This machine's devices did not answer within plan_minutes; write a larger one.")
    cfg, recipe = job.cfg, recipe_of(job)
    for warning in few_step.warnings(job, recipe):
        logger.warning("%s", warning)
    run = cost.Run.of(job, recipe, configs, target.kind, target.platform)
    layouts, refused = splits(run, target.devices)
    compilation = Compilation(run, layouts, pool, target)
    rows = compilation.rows
    notes = []
    if not paths.probe(os.path.expanduser(cfg.pretrained_model_name_or_path)).is_dir():
        notes.append(f"the checkpoint is not local: sizes are those of the official one of {cfg.model_name}")
    if tpu and not libtpu():
        notes.append(
            "analytic: libtpu, which compiles for TPUs, is not installed (on x86-64 Linux: pip install libtpu), so "
            "that all figures are arithmetic"
        )
    else:
        compilation.compile()
        refused += tuple(compilation.refused)
        notes += compilation.notes()
    if words := caching.described(job, recipe):
        notes.append(words if caching.is_static(cfg) else f"{words}; the plan counts all, as the run decides")
    if tpu is None:
        notes.append("seconds are modelled, by rough figures of such devices: their compiler counts no cycles")
    if not rows:
        raise UserError(refused[-1].reason)
    notes += sorted({stage.fault for row in rows.values() for stage in row.stages.values()} - {""})
    weights = sum(nbytes for _, nbytes in run.nets.values())
    notes.append(
        "predicted, not measured: nothing was run on these devices; compiling is left out, and so is loading "
        f"{weights / 2**30:.3g} GiB of weights (in the run's dtypes), which takes {report.clock(weights / 1e9)} from a "
        "disk of 1 GB/s"
    )
    ranked = tuple(sorted(rows.values(), key=lambda row: row.rank))
    size = max(((video.width, video.height) for video in job.videos), key=math.prod)
    windows = "" if job.windows is None else f" in {len(job.windows.starts)} windows of {cfg.context_window}"
    several = f"{len(job.videos)} videos of up to " if len(job.videos) > 1 else ""
    clips = f"{cfg.clips} clips of " if cfg.clips > 1 else ""
    parts = f" in {len(job.segments)} segments" if job.spec.task.segmented and len(job.segments) > 1 else ""
    shape = f"{size[0]} x {size[1]}, {clips}{cfg.num_frames} frames{windows}{parts}"
    words = f"{cfg.model_name}: {several}{shape}, {described(recipe.experts, caching.counted(job, recipe))}"
    plan = Plan((), words, str(target), target.chips, target.gib, ranked, refused, (), tuple(notes))
    if not plan.best:
        plan = dataclasses.replace(plan, changes=nearest(job, configs, target, plan))
    return plan, not compilation.left and not compilation.failed
