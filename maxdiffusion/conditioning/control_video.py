"""Input videos, read and checked before anything is loaded."""

from __future__ import annotations

import logging

import numpy as np
from jaxtyping import UInt8

from maxdiffusion.errors import UserError
from maxdiffusion.media.read import probe, read_video
from maxdiffusion.request import Job

log = logging.getLogger(__name__)

STEP = 16  # pixels: tolerance of proportions, for sizes rounded to its multiples

Frames = UInt8[np.ndarray, "f h w 3"]


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
    key: str,
    path: str,
    frames: int,
    height: int,
    width: int,
    like: tuple[str, Frames] | None = None,
    sized: bool = True,
) -> Frames:
    """The first `frames` frames of the file that `key` names, in their own size, and one more if there is one.

    Logs the part used. `like` is another key and its frames, of the same size and length; `sized` says whether
    height and width are those of the config.

    Raises:
      UserError: it cannot be read, has too few frames, is not as long or large as `like`, or would lose its proportions
        when it is made height x width, by more than the rounding of sizes.
    """
    found = read_video(path, frames + 1)
    count, h, w, _ = found.shape
    if count < frames:
        raise UserError(
            f"{key}={path} has {count} frames, and num_frames={frames} are to be made; give a longer one, or write "
            f"num_frames={(count - 1) // 4 * 4 + 1}."
        )
    if like is not None and found.shape != like[1].shape:
        one, other = (
            f"{x.shape[2]} x {x.shape[1]} pixels and {_number(len(x), frames)} frames" for x in (found, like[1])
        )
        raise UserError(f"{key}={path} has {one}, but {like[0]} has {other}; make both of one size and length.")
    scale = max(height / h, width / w)
    if h * scale >= height + STEP or w * scale >= width + STEP:
        scale = min(height / h, width / w)
        near = "*".join(str(max(int(side * scale) // STEP * STEP, STEP)) for side in (w, h))
        raise UserError(
            f"{key}={path} is {w} wide x {h} high, which {width} wide x {height} high would distort; crop it"
            + (f", or write size={near}." if sized else ".")
        )
    fps = probe(path).fps
    used = f"the first {frames} frames" if count > frames else f"all {frames} frames"
    rate = f" at {fps:g} per second" if fps else ""
    log.info("%s: %s of %d x %d pixels%s, made %d x %d", key, used, w, h, rate, width, height)
    return found


def _number(count: int, frames: int) -> str:
    return str(count) if count <= frames else f"more than {frames}"
