"""Finds the nearest runs that fit if no split does, by arithmetic from the nearest split's compiled figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.hardware.chips import slice_of
from maxdiffusion.planning.results import Change, Plan, Row, Target, Words, modelled
from maxdiffusion.planning.splits import splits
from maxdiffusion.request import Job, with_keys
from maxdiffusion.request.cost import Run
from maxdiffusion.request.session import recipe_of

Option = tuple[Words, Job, int]  # arguments, the job changed by them, devices


def nearest(job: Job, configs: Mapping[str, Any], target: Target, plan: Plan) -> tuple[Change, ...]:
    """Changes, each sufficient by itself, the least intrusive first.

    Args:
      job: a run that fits on no split.
      configs: of its networks.
      target: the devices.
      plan: its plan.
    """

    def rows(job: Job, devices: int) -> dict[Words, Row]:
        run = Run.of(job, recipe_of(job), configs, target.kind, target.platform)
        return modelled(run, splits(run, devices)[0], plan.gib)

    base = min(plan.rows, key=lambda row: row.gib)
    now = rows(job, target.devices)[base.overrides].stages
    missed = {name: stage.gib - now[name].gib for name, stage in base.stages.items()}  # by the model

    def fitting(job: Job, devices: int) -> Iterator[tuple[float, float, Words]]:
        """Seconds, GiB and overrides of each split that would fit."""
        with contextlib.suppress(UserError):
            for row in rows(job, devices).values():
                gib = max(stage.gib + missed[name] for name, stage in row.stages.items())
                if gib <= plan.gib:
                    yield row.seconds.total, gib, row.overrides

    found = []
    for options in _options(job, target):
        for words, changed, devices in options:
            if fits := min(fitting(changed, devices), default=None):
                found.append(Change((*words, *fits[2]), fits[1]))
                break
    return tuple(found)


def _options(job: Job, target: Target) -> Iterator[Iterator[Option]]:
    """The options of each kind of change, the nearest to `job` first."""
    cfg, spec = job.cfg, job.spec

    def key(name: str, *values: Any) -> Iterator[Option]:
        for value in values:
            if value != getattr(cfg, name):
                yield (f"{name}={value}",), with_keys(job, **{name: value}), target.devices

    if "transformer_2" in spec.nets:
        yield key("expert_residency", "in_turn")
    if recipe_of(job).guided:
        yield key("guidance_mode", "two_pass")
    yield key("per_device_batch_size", *range(cfg.per_device_batch_size - 1, 0, -1))
    yield _larger(job, target)
    frames, least = "segment_frame_length" if spec.task.segmented else "num_frames", max(1, job.segments.overlap)
    if cfg.context_window is not None:
        frames, least = "context_window", cfg.context_overlap
    yield key(frames, *range(getattr(cfg, frames) - spec.vae_stride[0], least, -spec.vae_stride[0]))
    yield (
        ((f"size={width}*{height}",), with_keys(job, width=width, height=height), target.devices)
        for width, height in spec.sizes
        if width * height < cfg.width * cfg.height
    )


def _larger(job: Job, target: Target) -> Iterator[Option]:
    if target.slice is None:
        return
    generation = target.slice.generation
    for times in (2, 4, 8):
        name = f"{generation.name}-{times * target.chips * generation.numbered}"
        with contextlib.suppress(UserError):
            yield (f"plan={name}",), job, slice_of(name).devices
