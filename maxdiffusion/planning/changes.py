"""Where no split fits: the nearest runs that would, by arithmetic from what the compiler said of the nearest split."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.hardware.chips import slice_of
from maxdiffusion.planning.results import Change, Plan, Split, Stage, modelled
from maxdiffusion.planning.splits import splits
from maxdiffusion.planning.target import Target
from maxdiffusion.request import Job, with_keys
from maxdiffusion.request.cost import Run
from maxdiffusion.request.session import recipe_of


def nearest(job: Job, configs: Mapping[str, Any], target: Target, plan: Plan) -> tuple[Change, ...]:
    """Changes of which each alone would do, the least intrusive first.

    Args:
      job: what does not fit.
      configs: of its nets.
      target: the devices.
      plan: what was found.
    """

    def modelled_of(job: Job, devices: int) -> dict[Split, dict[str, Stage]]:
        run = Run.of(job, recipe_of(job), configs, target.kind, target.platform)
        return {split: modelled(run, layout, plan.gib) for split, layout in splits(job, run, devices)[0].items()}

    base = min(plan.rows, key=lambda row: row.stages[row.peak].gib)
    now = modelled_of(job, target.devices)[base.split]
    missed = {name: stage.gib - now[name].gib for name, stage in base.stages.items()}  # by the model

    def needs(changed: Job, devices: int) -> tuple[float, tuple[str, ...]]:
        """GiB and overrides of the fastest split that fits; where none does, of the nearest."""
        tried = []
        for split, stages in modelled_of(changed, devices).items():
            gib = max(stage.gib + missed[name] for name, stage in stages.items())
            seconds = sum(stage.seconds.total for stage in stages.values())
            tried.append((max(gib, plan.gib), seconds, gib, split.overrides))
        *_, gib, overrides = min(tried)
        return gib, overrides

    found = []
    for options in _options(job, target):
        for words, changed, count in options:
            try:
                gib, overrides = needs(changed, count)
            except UserError:
                continue
            if gib <= plan.gib:
                found.append(Change((*words, *overrides), gib))
                break
    return tuple(found)


def _options(job: Job, target: Target) -> Iterator[Iterator[tuple[tuple[str, ...], Job, int]]]:
    """Of each kind of change, the steps away from `job`: words, what they make of it, devices."""
    cfg, spec = job.cfg, job.spec

    def key(name: str, *values: Any) -> Iterator[tuple[tuple[str, ...], Job, int]]:
        for value in values:
            if value != getattr(cfg, name):
                yield (f"{name}={value}",), with_keys(job, **{name: value}), target.devices

    if "transformer_2" in spec.nets:
        yield key("expert_residency", "in_turn")
    if recipe_of(job).guided:
        yield key("guidance_mode", "two_pass")
    yield key("per_device_batch_size", *range(cfg.per_device_batch_size - 1, 0, -1))
    yield _larger(job, target)
    frames = "segment_frame_length" if spec.task.segmented else "num_frames"
    yield key(frames, *range(getattr(cfg, frames) - spec.vae_stride[0], 1, -spec.vae_stride[0]))
    yield (
        ((f"size={width}*{height}",), with_keys(job, width=width, height=height), target.devices)
        for width, height in spec.sizes
        if width * height < cfg.width * cfg.height
    )


def _larger(job: Job, target: Target) -> Iterator[tuple[tuple[str, ...], Job, int]]:
    if target.slice is None:
        return
    generation = target.slice.generation
    for times in (2, 4, 8):
        name = f"{generation.name}-{times * target.chips * generation.numbered}"
        with contextlib.suppress(UserError):
            yield (f"plan={name}",), job, slice_of(name).devices
