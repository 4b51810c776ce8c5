"""Videos of several clips, each of which starts from the last frames of the one before. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence

from maxdiffusion.config import schema
from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError
from maxdiffusion.request.segments import Segments
from maxdiffusion.variants import VARIANTS, Task, WanSpec


def chained(cfg: Config) -> bool:
    """Whether a clip of the run starts from the frames of another, or of `extend`."""
    return cfg.clips > 1 or cfg.extend is not None


def segments(cfg: Config, reference_frames: int) -> Segments:
    """The clips as segments; `reference_frames` as in `Segments`."""
    overlap = cfg.overlap_frames if chained(cfg) else 0
    return Segments(total_frames(cfg), cfg.num_frames, overlap, reference_frames)


def total_frames(cfg: Config) -> int:
    """Frames of all clips, each once; those of `extend` that the first clip starts from are among them."""
    return cfg.num_frames + (cfg.clips - 1) * (cfg.num_frames - cfg.overlap_frames)


def check(cfg: Config, spec: WanSpec) -> None:
    """Checks the group "clips" as far as the keys decide it.

    Raises:
      UserError: the first that fails, with the nearest legal choice.
    """
    if not chained(cfg):
        for key in schema.group("clips"):
            if not schema.is_default(cfg, key):
                raise UserError(
                    f"{key} is only used with clips=N or extend=VIDEO; add one of them, or leave {key} out."
                )
        return
    _task(cfg, spec.task, spec.name)
    _overlap(cfg, spec)
    _lists(cfg)
    _inputs(cfg, spec.task)
    _redo(cfg)


def _task(cfg: Config, task: Task, name: str) -> None:
    key, value = ("clips", cfg.clips) if cfg.clips > 1 else ("extend", cfg.extend)
    if task.segmented:
        raise UserError(
            f"{key}={value} is not used by {name}, which makes long videos in segments by itself; leave it out, and "
            "give longer inputs."
        )
    if not task.chained:
        able = dict.fromkeys(spec.model_type for spec in VARIANTS.values() if spec.task.chained)
        raise UserError(
            f"{key}={value} is not used by {name}: a {task.name} model cannot start from frames of another clip; "
            f"choose a model of type {', '.join(able)}, or make long videos of T2V and VACE with context_window."
        )


def _overlap(cfg: Config, spec: WanSpec) -> None:
    value, step = cfg.overlap_frames, spec.vae_stride[0]
    most = cfg.num_frames - step
    if (value - 1) % step or value > most:
        if most < 1:
            raise UserError(
                f"num_frames={cfg.num_frames} is too short for clips; write at least num_frames={1 + step}."
            )
        below = min((value - 1) // step * step + 1, most)
        near = [each for each in (below, below + step) if each <= most]
        raise UserError(
            f"overlap_frames={value} must be of the form {step}n+1, as latents stand for {step} frames, and less than "
            f"num_frames={cfg.num_frames}; write {' or '.join(map(str, near))}."
        )
    if spec.task.name == "TI2V" and value > 1 and not cfg.extend:
        raise UserError(
            f"overlap_frames={value} is not used by {spec.name}, whose first clip starts from one image; write "
            "overlap_frames=1, or extend a video."
        )
    if (frames := total_frames(cfg)) > schema.MAX_FRAMES:
        raise UserError(
            f"clips={cfg.clips} of num_frames={cfg.num_frames} are {frames} frames, and a video has at most "
            f"{schema.MAX_FRAMES}; write fewer clips, and extend their video by a further run."
        )


def _lists(cfg: Config) -> None:
    for key, single in (("clip_prompts", "prompt"), ("clip_seeds", "seed")):
        given = getattr(cfg, key)
        if given and len(given) != cfg.clips:
            raise UserError(f"{key} has {len(given)} entries, but clips={cfg.clips}; give one for each clip.")
        if given and (cfg.prompts or len(getattr(cfg, single)) > 1):
            what = f"prompts={cfg.prompts}" if cfg.prompts else f"several values of {single}"
            raise UserError(
                f"{key} is not used beside {what}: it is that of all videos; make one video, or leave it out."
            )
    if not all(prompt.strip() for prompt in cfg.clip_prompts):
        raise UserError("clip_prompts has an empty prompt; write what that clip is to show.")
    if cfg.clip_padding == "reference" and len(set(cfg.clip_seeds)) < len(cfg.clip_seeds):
        raise UserError(
            "clip_padding=reference needs a different seed for each clip, as LoRAs of SVI repeat a clip of the same "
            "seed; give clip_seeds without repetition, or leave them out."
        )


def _inputs(cfg: Config, task: Task) -> None:
    in_channels = "image_channels" in task.conditions
    for key in ("clip_padding", "clip_mask"):
        if not in_channels and not schema.is_default(cfg, key):
            raise UserError(f"{key} is not used by {task.name}, but by I2V and FLF2V alone; leave it out.")
    if cfg.clip_padding == "reference" and cfg.solver == "renoise":
        raise UserError(
            "solver=renoise, which adds noise between steps, does not go with clip_padding=reference; choose another."
        )


def check_images(cfg: Config, task: Task, images: Sequence[str | None]) -> None:
    """Checks the images of the run's videos, None where one has none.

    Raises:
      UserError: one is missing, or not used.
    """
    if not chained(cfg) or cfg.decode_latents:
        return
    if cfg.clip_padding == "reference":
        if not all(images):
            raise UserError("clip_padding=reference needs the image that it shows in every clip; write image=FILE.")
    elif cfg.extend and any(images):
        reference = ", or clip_padding=reference, which shows it in every clip" * ("image_channels" in task.conditions)
        raise UserError(
            f"image is not used beside extend={cfg.extend}, whose last frames start the first clip; write "
            f"image={reference}."
        )
    elif task.name == "TI2V" and not cfg.extend and not all(images):
        raise UserError(f"clips={cfg.clips} of TI2V start from an image or a video; write image=FILE or extend=VIDEO.")


def _redo(cfg: Config) -> None:
    if cfg.redo_clip is None:
        return
    if cfg.redo_clip > cfg.clips:
        raise UserError(
            f"redo_clip={cfg.redo_clip} is none of clips={cfg.clips}; write 2 to {cfg.clips}"
            if cfg.clips > 1
            else f"redo_clip={cfg.redo_clip} needs clips={cfg.redo_clip} or more."
        )
    for key in ("prompts", "plan", "verify", "decode_latents", "initial_latents"):
        if getattr(cfg, key):
            raise UserError(f"redo_clip is not used beside {key}; leave one of them out.")
    if -1 in cfg.seed:
        raise UserError("redo_clip needs the seed of the video, which its record (.json) tells; write seed=N, not -1.")
