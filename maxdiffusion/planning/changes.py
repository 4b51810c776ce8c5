"""Where no split fits: the nearest runs that would, by arithmetic from what the compiler said of the nearest split."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from maxdiffusion import variants
from maxdiffusion.config import Config
from maxdiffusion.errors import UserError
from maxdiffusion.hardware.chips import slice_of
from maxdiffusion.planning.analytic import Model
from maxdiffusion.planning.results import Change, Plan
from maxdiffusion.planning.splits import splits
from maxdiffusion.planning.target import Target


def nearest(
    cfg: Config, configs: Mapping[str, Any], sizes: Mapping[str, int], target: Target, plan: Plan
) -> tuple[Change, ...]:
    """Each alone, the least intrusive first; what would not do is left out.

    Args:
      cfg: what does not fit.
      configs: of its nets.
      sizes: bytes of their weights.
      target: the devices.
      plan: what was found.
    """
    kind, platform, devices = target.kind, target.platform, target.devices
    model = Model.of(cfg, configs, sizes, kind, platform)
    heads = configs["transformer"].num_attention_heads
    base = min(plan.rows, key=lambda row: row.stages[row.peak].gib)
    plans, _ = splits(cfg, heads, devices, platform)
    modelled = model.stages(base.split, plans[base.split], plan.gib)
    # What the model misses of each stage.
    missed = {name: stage.gib - modelled[name].gib for name, stage in base.stages.items()}

    def needs(changed: Config, devices: int) -> tuple[float, tuple[str, ...]]:
        """GiB and overrides of the fastest split that fits; where none does, of the nearest."""
        other = Model.of(changed, configs, sizes, kind, platform)
        tried = []
        for split, attention in splits(changed, heads, devices, platform)[0].items():
            stages = other.stages(split, attention, plan.gib)
            gib = max(stage.gib + missed[name] for name, stage in stages.items())
            seconds = sum(stage.seconds.total for stage in stages.values())
            tried.append((max(gib, plan.gib), seconds, gib, split.overrides))
        *_, gib, overrides = min(tried)
        return gib, overrides

    found = []
    for options in _options(cfg, target):
        for words, changed, count in options:
            try:
                gib, overrides = needs(changed, count)
            except UserError:
                continue
            if gib <= plan.gib:
                found.append(Change((*words, *overrides), gib))
                break
    return tuple(found)


def _options(cfg: Config, target: Target) -> Iterator[Iterator[tuple[tuple[str, ...], Config, int]]]:
    """Of each kind of change, the steps away from `cfg`: words, what they make of it, devices."""
    spec = variants.get(cfg.model_name)

    def key(name: str, *values: Any) -> Iterator[tuple[tuple[str, ...], Config, int]]:
        for value in values:
            if value != getattr(cfg, name):
                yield (f"{name}={value}",), cfg.model_copy(update={name: value}), target.devices

    if "transformer_2" in spec.nets:
        yield key("expert_residency", "in_turn")
    if cfg.guidance_scale > 1:
        yield key("guidance_mode", "two_pass")
    yield key("per_device_batch_size", *range(cfg.per_device_batch_size - 1, 0, -1))
    yield _larger(cfg, target)
    frames = "segment_frame_length" if spec.model_type == "ANIMATE" else "num_frames"
    yield key(frames, *range(getattr(cfg, frames) - spec.vae_stride[0], 1, -spec.vae_stride[0]))
    yield (
        ((f"size={width}*{height}",), cfg.model_copy(update={"width": width, "height": height}), target.devices)
        for width, height in spec.sizes
        if width * height < cfg.width * cfg.height
    )


def _larger(cfg: Config, target: Target) -> Iterator[tuple[tuple[str, ...], Config, int]]:
    if target.slice is None:
        return
    generation = target.slice.generation
    for times in (2, 4, 8):
        name = f"{generation.name}-{times * target.chips * generation.numbered}"
        with contextlib.suppress(UserError):
            yield (f"plan={name}",), cfg, slice_of(name).devices
