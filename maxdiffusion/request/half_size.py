"""`low_resolution_steps`: the first steps of a run at half height and width, checked and counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maxdiffusion.errors import UserError
from maxdiffusion.request.caching import FEWEST, few_steps
from maxdiffusion.request.job import Job

if TYPE_CHECKING:
    from maxdiffusion.denoise.recipe import Recipe


def check(job: Job) -> None:
    """Checks `low_resolution_steps` beside the other keys.

    Raises:
      UserError: the task starts from given frames, a size does not suit, or another key excludes it.
    """
    cfg, spec = job.cfg, job.spec
    key = f"low_resolution_steps={cfg.low_resolution_steps}"
    if spec.task.name != "T2V":
        raise UserError(
            f"{key} is not used by {spec.name}, whose model_type is {spec.model_type}: what is given to it has one "
            "size, that of the video; leave it out, or choose a model of type T2V."
        )
    for other in ("video", "calibrate_cache", "cache_psnr", "verify"):
        if getattr(cfg, other):
            raise UserError(f"{key} and {other} exclude each other: both sizes would be needed; leave one of them out.")
    if what := few_steps(cfg):
        raise UserError(
            f"{key} is for schedules of many steps, but {what} is a few-step schedule, which has no step to give to "
            f"the smaller size; leave it out, or use at least {FEWEST} steps of a model that is not distilled."
        )
    steps = cfg.num_inference_steps + (cfg.num_inference_steps_2 or 0)
    if isinstance(cfg.low_resolution_steps, int) and cfg.low_resolution_steps >= steps:
        raise UserError(f"{key} leaves none of the {steps} steps at the whole size; it must be at most {steps - 1}.")
    if cfg.low_resolution_steps == "auto" and len({video.shape for video in job.videos}) > 1:
        raise UserError(f"{key} depends on the size, of which {cfg.prompts} has several; write a number of steps.")
    step = [4 * stride for stride in spec.vae_stride[1:]]
    for video in job.videos:
        for side, value, multiple in zip(("height", "width"), (video.height, video.width), step, strict=True):
            if value % multiple:
                below = value // multiple * multiple
                near = f"the nearest are {below} and {below + multiple}" if below else f"the nearest is {multiple}"
                raise UserError(
                    f"{side}={value} cannot be halved for {key}: it is not a multiple of {multiple}; {near}."
                )


def applied(job: Job, recipe: Recipe) -> Recipe:
    """The recipe with the steps at half size that the config asks for.

    Raises:
      UserError: `auto` finds none or leaves none.
    """
    from maxdiffusion.denoise.upsampling import level

    if (steps := job.cfg.low_resolution_steps) is None:
        return recipe
    if steps == "auto":
        _, height, width = job.latent_grid(job.videos[0])
        lowest, levels = level(height, width), recipe.schedule.sigmas[:-1]
        steps = int((levels > lowest).sum())
        if not 0 < steps < len(levels):
            raise UserError(
                f"low_resolution_steps=auto is for the steps above the noise level {lowest:.3f}, which are {steps} of "
                f"{len(levels)}; write a number from 1 to {len(levels) - 1}, or leave it out."
            )
    return recipe.half_size_first(steps)
