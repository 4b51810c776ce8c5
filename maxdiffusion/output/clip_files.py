"""The latents of each clip, kept beside its video as `<stem>.clip<number>.latents.safetensors`.

A clip's identity is that of the run that ends with it, so that a run which differs in later clips alone finds it.
"""

from __future__ import annotations

import dataclasses

from maxdiffusion.errors import UserError
from maxdiffusion.output import manifest, names, states
from maxdiffusion.request import Job, Video
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.paths import AnyPath, parse
from maxdiffusion.weights.headers import read_header


def suffix(number: int) -> str:
    """The suffix of the file of clip `number`, from 0."""
    return f".clip{number + 1}{names.LATENTS}"


def identities(job: Job, video: Video, model: str) -> tuple[str, ...]:
    """The identity of each clip; none of a video that is not made of clips. `model` is the checkpoint's digest."""
    return tuple(_identity(job, video, model, count) for count in range(1, job.cfg.clips + 1)) if job.chained else ()


def _identity(job: Job, video: Video, model: str, count: int) -> str:
    """The identity of the run that makes the first `count` clips alone."""
    prompts = tuple(job.prompt(video, number) for number in range(count))
    seeds = tuple(job.seed(video, number) for number in range(count))
    cfg = job.cfg.model_copy(update={"clips": count, "clip_prompts": prompts, "clip_seeds": seeds})
    last_image = video.last_image if count == job.cfg.clips else None  # it ends the last clip
    alone = dataclasses.replace(video, prompt="", seed=seeds[0], output=None, last_image=last_image, drawn=False)
    return states.identity(dataclasses.replace(job, cfg=cfg), alone, model)


def identity_of(path: AnyPath) -> str | None:
    """The identity in a file of latents; None where there is no such file."""
    try:
        return read_header(path)[1].get("identity") if path.exists() else None
    except (UserError, OSError):
        return None


def kept(job: Job, video: Video, model: str) -> list[str]:
    """The files of the clips before `redo_clip`.

    Raises:
      UserError: one of them is not among the results.
    """
    folder = parse(job.cfg.save_file).parent if job.cfg.save_file else manifest.folder(job)
    here, found = sorted(paths.names(folder)), []
    for number, identity in enumerate(identities(job, video, model)[: (job.cfg.redo_clip or 1) - 1]):
        files = [folder / name for name in here if name.endswith(suffix(number))]
        file = next((file for file in files if identity_of(file) == identity), None)
        if file is None:
            raise UserError(
                f"redo_clip={job.cfg.redo_clip} needs the latents of clip {number + 1} of this command, and no file "
                f"*{suffix(number)} in {folder} holds them (other prompts, seeds, settings or weights make others); "
                "leave redo_clip out to make all clips."
            )
        found.append(str(file))
    return found
