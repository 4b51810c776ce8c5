"""The sound of a run's videos: of an input video that it keeps (`keep_audio`), or of S2V's `audio`. Imports no jax."""

from __future__ import annotations

import math
from fractions import Fraction

from maxdiffusion.config import schema
from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError

# Keys of videos that show what the result shows at the same time; the first that has sound gives it.
_KEYS = ("video", "pose_video", "face_video", "background_video", "driving_video")


def keys(cfg: Config) -> tuple[str, ...]:
    """The keys of input videos that may give the sound; a video that is extended begins the result, and is alone."""
    return ("extend",) if cfg.extend else tuple(key for key in _KEYS if getattr(cfg, key))


def check(cfg: Config) -> None:
    """Checks `keep_audio` as far as the keys decide it.

    Raises:
      UserError: the result holds no sound, no input has any, or the result shows it at other times.
    """
    if not cfg.keep_audio:
        return
    if cfg.audio:
        raise UserError(
            f"keep_audio is not used beside audio={cfg.audio}, whose sound the result has anyway; leave it out."
        )
    if cfg.output_format != "mp4":
        raise UserError(
            f"keep_audio is not used with output_format={cfg.output_format}, which holds no sound; write "
            "output_format=mp4, or leave keep_audio out."
        )
    if cfg.decode_latents and not cfg.extend:
        raise UserError("keep_audio is not used with decode_latents, which reads no input video; leave it out.")
    if not keys(cfg):
        raise UserError(
            f"keep_audio is only used with an input video ({', '.join((*_KEYS, 'extend'))}), and none is given; leave "
            "it out."
        )
    if cfg.input_frames == "spread" and not cfg.extend:
        raise UserError(
            "keep_audio and input_frames=spread exclude each other: frames spread over the whole video are shown at "
            "other times than its sound; write input_frames=timed."
        )


def frames(cfg: Config, seconds: Fraction, dropped: int) -> int:
    """The frames that a sound fills, without the first `dropped`.

    Raises:
      UserError: there are none, or more than a video may have.
    """
    found = math.floor(seconds * cfg.fps) - dropped
    lasts = f"audio={cfg.audio} lasts {float(seconds):.4g} s, which fills"
    if found < 1:
        raise UserError(
            f"{lasts} no frame after the first {dropped} at fps={cfg.fps}; give a sound of "
            f"{float((dropped + 1) / cfg.fps):.3g} s or more."
        )
    if found > schema.MAX_FRAMES:
        raise UserError(
            f"{lasts} {found} frames at fps={cfg.fps}, and a video has at most {schema.MAX_FRAMES}; write "
            f"num_frames={schema.MAX_FRAMES} for its beginning, or give a part of it."
        )
    return found
