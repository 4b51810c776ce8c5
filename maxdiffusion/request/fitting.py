"""What is said of device memory that does not suffice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax

from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes
from maxdiffusion.request.job import Job
from maxdiffusion.runtime import memory

# Keys whose float32 costs memory, by phase of the clock.
_DTYPES = {
    "load": ("weights_dtype", "text_encoder_dtype", "vae_dtype"),
    "text": ("text_encoder_dtype",),
    "compile": ("weights_dtype", "activations_dtype"),
    "denoise": ("weights_dtype", "activations_dtype"),
    **dict.fromkeys(("image", "control", "video", "decode"), ("vae_dtype",)),
}


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
    found += [f"{key}=bfloat16" for key in _DTYPES.get(name, ()) if getattr(cfg, key) == "float32"]
    found.append("more devices" if cfg.decode_latents else "more devices, a smaller size or num_frames")
    return f"{', '.join(found)} (plan=here counts what fits)"
