"""`plan=`: which splits of a TPU slice, or of this machine, a run fits, how long it would take, and why."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from maxdiffusion.config import Config, checks
from maxdiffusion.config.examples import examples
from maxdiffusion.errors import UserError
from maxdiffusion.hardware.chips import Slice, compile_only
from maxdiffusion.planning import cache, picture, report
from maxdiffusion.planning.cache import Cache
from maxdiffusion.planning.pool import Job, Pool, libtpu
from maxdiffusion.planning.results import Plan, Row, from_json, to_json
from maxdiffusion.planning.target import devices_of, identity, slice_named
from maxdiffusion.runtime import log, paths
from maxdiffusion.runtime.atomic import atomic_path
from maxdiffusion.weights import official

logger = logging.getLogger(__name__)


def run(cfg: Config, words: Sequence[str]) -> Plan:
    """Prints what it found, writes `plan_file`, and returns it.

    Args:
      cfg: the run to be planned.
      words: of the command line that said so.

    Raises:
      UserError: as `make`, or a file cannot be written.
    """
    log.setup(cfg.log_level)
    plan = make(cfg)
    plan = dataclasses.replace(plan, command=_command(words, plan))
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


def make(cfg: Config) -> Plan:
    """The plan, compiled within `plan_minutes` or known from before; what is known needs no jax.

    Raises:
      UserError: the run is illegal on every split, the devices do not exist, nothing can be compiled here.
    """
    missing = [key for key in ("image", "last_image") if key in checks.required(cfg) and not getattr(cfg, key)]
    cfg = cfg.model_copy(update=dict.fromkeys(missing, ("of any content",)))  # of which nothing is read
    deadline = time.monotonic() + 60 * cfg.plan_minutes
    assert cfg.plan
    tpu = slice_named(cfg.plan)
    configs = official.configs_of(cfg)
    store = Cache(cfg.jax_cache_dir)
    asked = cache.asked(cfg, configs, identity(tpu))
    plan = store.read(asked, from_json)
    if plan is None:
        plan, whole = _make(cfg, configs, tpu, deadline)
        if whole:  # else the next ask goes on
            store.write(asked, to_json(plan))
    return plan


def _command(words: Sequence[str], plan: Plan) -> tuple[str, ...]:
    """The words of a run, without those of the plan and what its overrides say anew."""
    said = {"plan", "plan_file", "plan_minutes", "price_per_chip_hour", "overwrite"}
    said |= {word.partition("=")[0] for row in plan.rows for word in row.split.overrides}
    return tuple(word for word in words if word.partition("=")[0] not in said)


# ---- making one


def _make(cfg: Config, configs: Mapping[str, Any], tpu: Slice | None, deadline: float) -> tuple[Plan, bool]:
    """The plan, and whether all was compiled that was to be."""
    pool = Pool(compile_only(tpu.topology) if tpu else {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, deadline)
    target = devices_of(tpu, pool)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of this process, which compiles nothing
    from maxdiffusion.planning.analytic import Model, nbytes
    from maxdiffusion.planning.changes import nearest
    from maxdiffusion.planning.compilation import Compilation, rank
    from maxdiffusion.planning.splits import splits

    found, refused = splits(cfg, configs["transformer"].num_attention_heads, target.devices, target.platform)
    sizes = nbytes(cfg, configs)
    model = Model.of(cfg, configs, sizes, target.kind, target.platform)
    rows = {
        split: Row(split, model.steps * model.units(split.data), model.stages(split, plan, target.gib))
        for split, plan in found.items()
    }
    notes, whole = [], True
    if not paths.probe(os.path.expanduser(cfg.pretrained_model_name_or_path)).is_dir():
        notes.append(f"the checkpoint is not here: sizes are those of the official one of {cfg.model_name}")
    if tpu and not libtpu():
        notes.append(
            "analytic: libtpu, which compiles for TPUs, is not installed (on x86-64 Linux: pip install libtpu), so "
            "that all figures are arithmetic"
        )
    else:
        job = functools.partial(Job, slice=tpu.topology if tpu else None, gib=target.gib)
        compilation = Compilation(cfg, rows, model, pool, target.gib, job)
        compilation.run()
        whole = not compilation.left
        refused += tuple(compilation.refused)
        notes += compilation.notes()
    if tpu is None:
        notes.append("seconds are modelled, by rough figures of such devices: their compiler counts no cycles")
    if not rows:
        raise UserError(refused[-1].reason)
    ranked = tuple(sorted(rows.values(), key=rank))
    plan = Plan((), _run(cfg), str(target), target.chips, target.gib, ranked, refused, (), tuple(notes))
    if not plan.best:
        plan = dataclasses.replace(plan, changes=nearest(cfg, configs, sizes, target, plan))
    return plan, whole


def _run(cfg: Config) -> str:
    """The run in words."""
    videos = examples(cfg)
    size = max(((video.width, video.height) for video in videos), key=math.prod)
    several = f"{len(videos)} videos of up to " if len(videos) > 1 else ""
    return f"{cfg.model_name}: {several}{size[0]} x {size[1]}, {cfg.num_frames} frames, {cfg.num_inference_steps} steps"
