"""How a run's frames are cut into parts that are denoised one after another. Free of jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from maxdiffusion.config.schema import Config
from maxdiffusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class Parts:
    """`frames` in parts of `length`, each sharing `carried` frames with the one before.

    `leading` latent frames stand before those of each part: denoised with them, and no part of the result.

    Raises:
      UserError: nothing would be new in a part.
    """

    frames: int
    length: int
    carried: int = 0
    leading: int = 0

    def __post_init__(self) -> None:
        if self.carried >= min(self.length, self.frames):
            raise UserError(
                f"prev_segment_conditioning_frames={self.carried} leaves nothing new in segments of {self.length} "
                f"frames for a video of {self.frames}; write less, 1 or 5, or longer segments."
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """The first frame of each part; the last part may end behind the video."""
        return tuple(range(0, self.frames - self.carried, self.length - self.carried))

    def of(self, start: int) -> list[int]:
        """Which frames of the video a part shows; behind its end the video runs backwards, and forth again."""
        period = max(2 * (self.frames - 1), 1)
        return [min(at % period, -at % period) for at in range(start, start + self.length)]

    def latent_frames(self, per_part: int) -> int:
        """Of all parts, without the leading ones."""
        return len(self.starts) * per_part

    def decode(self, decode: Callable[[Any], Iterator[Any]], latents: Any) -> Iterator[Any]:
        """The frames of the whole video, in chunks, each frame once; `latents` and chunks have frames on axis 1.

        Args:
          decode: the latents of one part -> its frames, in chunks.
          latents: of all parts, one after another, without the leading frames.
        """
        per_part = latents.shape[1] // len(self.starts)
        for part, start in enumerate(self.starts):
            at, end = start, start + self.carried if part else 0
            for chunk in decode(latents[:, part * per_part : (part + 1) * per_part]):
                first, last = max(end - at, 0), min(self.frames - at, chunk.shape[1])
                if first < last:
                    yield chunk[:, first:last]
                at += chunk.shape[1]


def of(cfg: Config) -> Parts:
    """All frames at once, but for Animate."""
    if cfg.model_type == "ANIMATE":
        return Parts(cfg.num_frames, cfg.segment_frame_length, cfg.prev_segment_conditioning_frames, leading=1)
    return Parts(cfg.num_frames, cfg.num_frames, leading=len(cfg.reference_images))
