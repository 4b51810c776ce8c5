"""How a video's frames are cut into segments that are denoised one after another. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from maxdiffusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class Segments:
    """`frames` in segments of `length`, each but the first starting with the last `overlap` frames of the one before.

    `reference_frames` latent frames stand before those of each segment: denoised with them, dropped from the result.
    `dropped` frames are made before those of the video; segments that have any are decoded one after another.

    Raises:
      UserError: no frame of a segment would be new.
    """

    frames: int
    length: int
    overlap: int = 0
    reference_frames: int = 0
    dropped: int = 0

    def __post_init__(self) -> None:
        if self.overlap >= min(self.length, self.frames):
            raise UserError(
                f"prev_segment_conditioning_frames={self.overlap} leaves nothing new in segments of {self.length} "
                f"frames for a video of {self.frames}; write less, 1 or 5, or longer segments."
            )

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first frame of each segment, counted from the first that is made; the last may end after the video."""
        return tuple(range(0, self.frames + self.dropped - self.overlap, self.length - self.overlap))

    def frames_of(self, start: int) -> list[int]:
        """The video's frames in the segment from `start`; after its end the video is read backwards, then forwards."""
        period = max(2 * (self.frames - 1), 1)
        return [min(at % period, -at % period) for at in range(start, start + self.length)]

    def decode(self, decode: Callable[[Any], Iterator[Any]], latents: Any, there: int = 0) -> Iterator[Any]:
        """The frames of the whole video in chunks, each frame once; latents and chunks have frames on axis 1.

        Args:
          decode: the latents of one segment -> its frames, in chunks.
          latents: of all segments, one after another, without the reference frames.
          there: number of first frames that are not needed; a segment of such frames alone is decoded only where later
            ones are decoded after it.
        """
        per_segment = latents.shape[1] // len(self)
        for segment, start in enumerate(self.starts):
            at = start - self.dropped
            end = max(at + self.overlap if segment else 0, there)
            if min(at + self.length, self.frames) <= there and not self.dropped:
                continue
            for chunk in decode(latents[:, segment * per_segment : (segment + 1) * per_segment]):
                first, last = max(end - at, 0), min(self.frames - at, chunk.shape[1])
                if first < last:
                    yield chunk[:, first:last]
                at += chunk.shape[1]
