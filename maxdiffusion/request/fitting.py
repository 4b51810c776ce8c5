"""What is said of device memory: before a run that may not fit, and after one that did not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.denoise.recipe import Recipe
from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes, resolve
from maxdiffusion.request import cost, layout
from maxdiffusion.request.job import Job
from maxdiffusion.runtime import memory

log = logging.getLogger(__name__)

# Keys whose float32 costs memory, by phase of the clock.
_DTYPES = {
    "load": ("weights_dtype", "text_encoder_dtype", "vae_dtype"),
    **dict.fromkeys(("audio", "text"), ("text_encoder_dtype",)),
    "compile": ("weights_dtype", "activations_dtype"),
    "denoise": ("weights_dtype", "activations_dtype"),
    **dict.fromkeys(("image", "control", "video", "decode"), ("vae_dtype",)),
}


def warn(job: Job, recipe: Recipe, configs: Mapping[str, Any], plan: AttentionPlan, mesh: Mesh) -> None:
    """Logs a warning for each stage that needs, by the cost model, more memory than a device of this host has."""
    devices = list(mesh.devices.flat)
    _, dcn = resolve(*layout.degrees(job.cfg), devices)
    run = cost.Run.of(job, recipe, configs, devices[0].device_kind, devices[0].platform)
    available = memory.per_device() / 2**30
    for name, stage in run.stages(layout.layout(job.cfg, plan, devices, mesh.shape[axes.DATA] // dcn.data)).items():
        if stage.gib > available and (name == "decode" or not job.cfg.decode_latents):
            log.warning(
                "%s needs about %.1f GiB of each device (modelled), which has %.1f; what needs less: %s",
                *(name, stage.gib, available, words(job, name)),
            )


@contextlib.contextmanager
def explained(job: Job, kept: Callable[[], str] = str) -> Iterator[None]:
    """Adds to an error for lack of device memory what of the run is `kept`, and which words would fit.

    Raises:
      UserError: in place of it, one sentence.
    """
    try:
        with memory.explained("denoise"):  # also what its preparation allocates outside of a phase
            yield
    except memory.OutOfMemory as error:
        said = (str(error), kept(), f"what needs less: {words(job, error.phase)}")
        raise UserError("; ".join(part for part in said if part)) from None


def words(job: Job, phase: str) -> str:
    """Settings that need less memory in a phase of the clock; those that keep the video come first."""
    cfg, devices, found, name = job.cfg, jax.device_count(), [], phase.partition(" ")[0]
    if name in ("load", "compile", "denoise"):
        if "transformer_2" in job.spec.nets and cfg.expert_residency == "together":
            found.append("expert_residency=in_turn")
        if devices > 1 and cfg.ici_fsdp_parallelism == 1 and axes.EMBED not in dict(cfg.logical_axis_rules):
            found.append("'logical_axis_rules=[[embed,[fsdp,context]]]'")
    guided = max(cfg.guidance_scale, cfg.guidance_scale_2 or 1) > 1
    if name in ("compile", "denoise") and guided and cfg.guidance_mode != "two_pass":
        found.append("guidance_mode=two_pass")
    if cfg.per_device_batch_size > 1:
        found.append("per_device_batch_size=1")
    holds_transformer = name in ("compile", "denoise") or phase.startswith("load transformer")
    if holds_transformer and cfg.quantization == "none":
        found.append("quantization=auto")
    found += [f"{key}=bfloat16" for key in _DTYPES.get(name, ()) if getattr(cfg, key) == "float32"]
    found.append("more devices" if cfg.decode_latents else "more devices, a smaller size or num_frames")
    return f"{', '.join(found)} (plan=here counts what fits)"
