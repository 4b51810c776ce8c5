"""The input video whose sound a run keeps (`keep_audio`). Imports no jax."""

from __future__ import annotations

from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError

# Keys of videos that show what the result shows at the same time; the first that has sound gives it.
_KEYS = ("video", "pose_video", "face_video", "background_video")


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
