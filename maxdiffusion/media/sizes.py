"""The size of a video in the proportions of an image; the three rules in use. Imports no numpy: resolving needs it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from maxdiffusion.errors import UserError

Size = tuple[int, int]  # width, height

# (pixels, size of the image, step) -> a size in multiples of `step`; a side of 0 where the image is too narrow.
Rule = Callable[[int, Size, int], Size]


def floored(area: int, image: Size, step: int) -> Size:
    """Both sides rounded down. Reference: `WanI2V.generate` of the official repository, and `WanFLF2V.generate`."""
    aspect = image[1] / image[0]
    return int(math.sqrt(area / aspect) // step) * step, int(math.sqrt(area * aspect) // step) * step


def nearest(area: int, image: Size, step: int) -> Size:
    """One side rounded down and the other filling the area: of the two ways the one that keeps the proportions best.

    Reference: `best_output_size` of the official repository, by `WanTI2V.i2v`.
    """
    ratio = image[0] / image[1]
    width = (area * ratio) ** 0.5
    by_height, by_width = int(area / width // step * step), int(width // step * step)
    if not min(by_height, by_width):
        return by_width, by_height
    sizes = ((int(area / by_height // step * step), by_height), (by_width, int(area / by_width // step * step)))
    return min(sizes, key=lambda size: max(ratio / (size[0] / size[1]), size[0] / size[1] / ratio))


def rounded(area: int, image: Size, step: int) -> Size:
    """Both sides rounded to whole pixels, then down. Reference: the example of `diffusers.WanImageToVideoPipeline`."""
    aspect = image[1] / image[0]
    height, width = (round(math.sqrt(area * ratio)) // step * step for ratio in (aspect, 1 / aspect))
    return width, height


@dataclasses.dataclass(frozen=True)
class Proportions:
    """How an image decides the size of its video.

    Attributes:
      rule: the formula.
      step: what both sides are multiples of.
      area: pixels of the video; None where its size is exact.
    """

    rule: Rule
    step: int
    area: int | None

    def size(self, area: int, image: Size) -> Size:
        """The size of a video of about `area` pixels.

        Raises:
          UserError: the image is too narrow.
        """
        width, height = self.rule(area, image, self.step)
        if not min(width, height):
            raise UserError(
                f"An image of {image[0]} x {image[1]} pixels is too narrow for a video of its proportions of "
                f"{area} pixels; crop it, or give width and height."
            )
        return width, height
