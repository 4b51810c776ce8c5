"""Context windows: the parts of a long video over which each denoise step is computed. Imports no jax.

The masks are those of DiffSynth-Studio's `TemporalTiler_BCTHW`; the last window is shifted back to the end of the
video, as in ComfyUI-WanVideoWrapper, so that all have one length and one program.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of `length` latent frames over `frames`, each starting `length - overlap` after the one before.

    `leading` latent frames stand before those of the video (VACE's references); every window has them.
    `overlap < length <= frames`.
    """

    frames: int
    length: int
    overlap: int = 0
    leading: int = 0

    @property
    def starts(self) -> tuple[int, ...]:
        """The first frame of each window, without the leading ones."""
        last = self.frames - self.length
        return (*range(0, last, self.length - self.overlap), last)

    @property
    def weights(self) -> list[list[float]]:
        """The weight of each window's frames, leading ones included; those of one frame of the video add up to 1.

        Before normalization: 1 inside, (i + 0.5) / overlap on sides that are not ends of the video.
        """
        masks = [[self._mask(start, at) for at in range(self.length)] for start in self.starts]
        sums = [0.0] * self.frames
        for start, mask in zip(self.starts, masks, strict=True):
            for at, value in enumerate(mask, start):
                sums[at] += value
        leading = [1 / len(masks)] * self.leading
        return [
            leading + [value / sums[at] for at, value in enumerate(mask, start)]
            for start, mask in zip(self.starts, masks, strict=True)
        ]

    def turns(self, rows: int, degree: int) -> list[list[int]]:
        """The numbers of the windows that are computed at the same time, turn by turn.

        As few as make a batch of `rows` divide over `degree` devices; the last turn is filled with the last window.
        """
        each = degree // math.gcd(rows, degree)
        numbers = [*range(len(self.starts)), *[len(self.starts) - 1] * (-len(self.starts) % each)]
        return [numbers[first : first + each] for first in range(0, len(numbers), each)]

    def frames_of(self, number: int) -> list[int]:
        """The latent frames of a window, leading ones included."""
        first = self.leading + self.starts[number]
        return [*range(self.leading), *range(first, first + self.length)]

    def __str__(self) -> str:
        last = self.starts[-2] + self.length - self.starts[-1] if len(self.starts) > 1 else 0
        shifted = f", the last two {last}" if last > self.overlap else ""
        return (
            f"{len(self.starts)} of {self.length} latent frames over {self.frames}, overlapping {self.overlap}{shifted}"
        )

    def _mask(self, start: int, at: int) -> float:
        ramp = self.overlap or 0.5  # without an overlap 1 everywhere
        left = (at + 0.5) / ramp if start else 1.0
        right = (self.length - at - 0.5) / ramp if start + self.length < self.frames else 1.0
        return min(1.0, left, right)
