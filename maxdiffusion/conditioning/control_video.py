"""Input videos, read and checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import UInt8

from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError
from maxdiffusion.media.frames import as_mask, covering, letterboxed, resized
from maxdiffusion.media.read import Clip, VideoInfo, probe, read_clip, spread, stored_times, times
from maxdiffusion.request import Job

log = logging.getLogger(__name__)

STEP = 16  # pixels: tolerance of proportions, for sizes rounded to its multiples

Resizing = Literal["stretched", "covered", "letterboxed"]
_RESIZE = {"stretched": resized, "covered": covering, "letterboxed": letterboxed}


@dataclasses.dataclass(frozen=True)
class Used:
    """What was used of an input video, for the record beside the result.

    Attributes:
      key: of the config.
      file: its value.
      info: size and rate of the file.
      first: number of the first stored frame used, from 0.
      last: number of the last.
      count: number of stored frames used.
      colour: how its colours are stored, and what was made of them.
      sound: whether it has sound.
    """

    key: str
    file: str
    info: VideoInfo
    first: int
    last: int
    count: int
    colour: str
    sound: bool = False

    def record(self) -> dict[str, Any]:
        """As JSON types."""
        fps, frames = self.info.fps, {"first": self.first, "last": self.last, "count": self.count}
        rate = fps if fps is None else fps.numerator if fps.denominator == 1 else str(fps)
        return {"file": self.file, "fps": rate, "frames": frames, "colour": self.colour}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ControlVideo:
    """The frames of an input video, one for each of the result, and their origin."""

    frames: UInt8[np.ndarray, "f h w 3"]
    used: Used = dataclasses.field(metadata={"static": True})


def one_size(job: Job) -> tuple[int, int]:
    """Height and width of all videos, which share one control video.

    Raises:
      UserError: a line of a prompt file has another size.
    """
    cfg = job.cfg
    others = {(video.width, video.height) for video in job.videos} - {(cfg.width, cfg.height)}
    if others:
        width, height = min(others)
        raise UserError(
            f"prompts={cfg.prompts} has a line of {width} x {height} pixels, but the videos that control all lines are "
            f"made {cfg.width} x {cfg.height}; leave the sizes of lines out, or run those lines separately."
        )
    return cfg.height, cfg.width


def read(
    cfg: Config,
    key: str,
    path: str,
    height: int,
    width: int,
    like: ControlVideo | None = None,
    sized: bool = True,
    fit: Resizing = "stretched",
    at: Sequence[int] = (),
) -> ControlVideo:
    """The frames of the file that `key` names, resized, one for each of the result; see the key `input_frames`.

    Files without times give their first frames, or frames spread over them. One picture stands for all frames, except
    as `video`. Of a mask that is not opaque, alpha is the mask. Logs what is used.

    Args:
      cfg: for num_frames, fps and input_frames.
      key: such as "video".
      path: its value.
      height: of the frames.
      width: of the frames.
      like: another input, of the same size.
      sized: whether height and width are those of the config; otherwise they are a maximum.
      fit: stretched to the size by `frames.resized`, covering it and cropped by `frames.covering`, or whole and on
        black by `frames.letterboxed`.
      at: numbers of the stored frames to take; empty: those of `input_frames`.

    Raises:
      UserError: it cannot be read, is too short, is not as large as `like`, or would lose its proportions when it is
        stretched to height x width, by more than the rounding of sizes.
    """
    frames, info = cfg.num_frames, probe(path)
    if like is not None and (info.width, info.height) != (like.used.info.width, like.used.info.height):
        raise UserError(
            f"{key}={path} has {info.width} x {info.height} pixels, but {like.used.key} has {like.used.info.width} x "
            f"{like.used.info.height}; make both of one size."
        )
    if fit == "stretched":
        _check_proportions(key, path, info, height, width, sized)
    if not sized:  # a smaller one stays as it is: the network's own size is not known yet
        height, width = min(height, info.height), min(width, info.width)
    resize = functools.partial(_RESIZE[fit], height=height, width=width)
    is_mask = key in ("mask", "mask_video")
    clip = read_clip(path, at or wanted(cfg, path), resize, alpha=is_mask)
    whole = clip.still and key != "video"
    if len(clip.frames) < frames and not whole:
        raise UserError(f"{key}={path} {_too_short(cfg, clip)}")
    made = f"{info.width} x {info.height} pixels, made {width} x {height}"
    cropped = "cropped" if fit == "covered" and info.width * height != info.height * width else ""
    parts = (_part(cfg, clip), made, cropped, clip.colour)
    sound = "its sound is not kept" if clip.sound and not cfg.keep_audio else ""
    alpha = "its alpha is the mask" if is_mask and clip.frames[..., 3].min() < 255 else ""
    log.info("%s: %s", key, "; ".join(filter(None, (*parts, alpha, clip.damage, sound))))
    shown = as_mask(clip.frames) if is_mask else clip.frames
    first, last, count = clip.indices[0], clip.indices[-1], len(set(clip.indices))
    used = Used(key, path, info, first, last, count, clip.colour, clip.sound)
    return ControlVideo(np.broadcast_to(shown, (frames, *shown.shape[1:])), used)


def wanted(cfg: Config, *paths: str) -> Sequence[Fraction] | Sequence[int]:
    """Times or numbers of the frames to read of videos that belong together; the first has the times."""
    if cfg.input_frames == "timed":
        return times(cfg.num_frames, cfg.fps)
    if cfg.input_frames == "every":
        return range(cfg.num_frames)
    stored, *others = (stored_times(path) for path in paths)
    common = min(
        [len(stored), *(len(other) for other in others if len(other) > 1)]
    )  # one picture stands for all frames
    return spread(stored[:common], cfg.num_frames)


def _check_proportions(key: str, path: str, info: VideoInfo, height: int, width: int, sized: bool) -> None:
    w, h = info.width, info.height
    scale = max(height / h, width / w)
    if h * scale >= height + STEP or w * scale >= width + STEP:
        scale = min(height / h, width / w)
        near = "*".join(str(max(int(side * scale) // STEP * STEP, STEP)) for side in (w, h))
        raise UserError(
            f"{key}={path} is {w} wide x {h} high, which {width} wide x {height} high would distort; crop it"
            + (f", or write size={near}." if sized else ".")
        )


def _timed(cfg: Config, clip: Clip) -> bool:
    return clip.timed and cfg.input_frames == "timed"


def _too_short(cfg: Config, clip: Clip) -> str:
    """The end of a sentence that begins with the key and its value."""
    found, frames = len(clip.frames), cfg.num_frames
    remedy = (
        f"and num_frames={frames} are to be made; give a longer one, or write num_frames={(found - 1) // 4 * 4 + 1}"
    )
    damage = f" ({clip.damage})" if clip.damage else ""
    if clip.still:
        return f"is one picture, and num_frames={frames} are to be made; give a video, or write num_frames=1."
    if not _timed(cfg, clip):
        return f"has {found} frames{damage}, {remedy}."
    stored = clip.info.frames or clip.indices[-1] + 1
    every = f", or input_frames=every to take each stored frame once ({stored} frames)" if stored > found else ""
    return (
        f"lasts {_number(clip.seconds or clip.until)} s ({stored} frames{_rate(clip.info.fps)}){damage}, which is "
        f"{found} frames at fps={cfg.fps}, {remedy}{every}."
    )


def _part(cfg: Config, clip: Clip) -> str:
    """How much of an input is used, and how."""
    frames, stored = cfg.num_frames, clip.info.frames
    if clip.still:
        return f"one picture for all {frames} frames" if frames > 1 else "one picture"
    if _timed(cfg, clip):
        of = f" of {_number(clip.seconds)}" if clip.seconds else ""
        rate = _rate(clip.info.fps) or " at its own times"
        used = min(frames / cfg.fps, clip.until)
        return f"{_number(used)}{of} s{rate}, each frame as shown at {_number(cfg.fps)} per second"
    of = f" of {stored}" if stored else ""
    if cfg.input_frames == "spread":
        return f"{frames}{of} frames{_rate(clip.info.fps)}, spread from the first to number {clip.indices[-1]}"
    if not clip.timed:
        return f"the first {frames}{of} frames, which have no times, taken at {_number(cfg.fps)} per second"
    return f"the first {frames}{of} frames{_rate(clip.info.fps)}, taken at {_number(cfg.fps)} per second"


def _rate(fps: Fraction | None) -> str:
    return f" at {_number(fps)} per second" if fps else ""


def _number(value: Fraction) -> str:
    return f"{float(value):.4g}"
