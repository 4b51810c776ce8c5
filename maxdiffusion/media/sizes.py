"""The size of a video in the proportions of an image or a video; the rules in use.

Imports no numpy: resolving needs it.
"""

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


def floored_twice(area: int, image: Size, step: int) -> Size:
    """`floored` of the image's own sides rounded down.

    Reference: diffusers' `WanAnimate2ProcessImagesInputStep`.
    """
    width, height = own(area, image, step)
    return floored(area, (width, height), step) if min(width, height) else (width, height)


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


def within(area: int, video: Size, step: int) -> Size:
    """One side rounded to the nearest multiple, the other down; not more squares of `step` than the video has.

    Reference: `VaceVideoProcessor` of Wan2.1, which then crops the video, scaled to cover that size.
    """
    squares = min(area / step**2, (video[0] // step) * (video[1] // step))
    rows = round(math.sqrt(squares * video[1] / video[0]))
    return (int(squares / rows) * step if rows else 0), rows * step


def own(area: int, video: Size, step: int) -> Size:
    """The video's own size, rounded down, whatever the area.

    Reference: `WanAnimate.generate` of the official repository, which takes the frames of the pose as they are.
    """
    return video[0] // step * step, video[1] // step * step


def covered(area: int, image: Size, step: int) -> Size:
    """Both sides of the image rounded up, after it is made smaller until they fit in the area; never made larger.

    Reference: `WanS2V.get_size_less_than_area` of the official repository, which tries a hundred scales.
    """
    width, height = image
    most, least, pixels = 1.0, 0.1, width * height
    if pixels > area:
        most = math.sqrt(area / pixels)
        b, c = (step - 1) * (height + width), (step - 1) ** 2 - area
        least = (-b + math.sqrt(b**2 - 2 * pixels * c)) / (2 * pixels)
    for i in range(100):
        scale = most - (most - least) * i / 100
        w, h = (-(-int(side * scale) // step) * step for side in image)
        if w * h <= area:
            return w, h
    w, h = (int((area * ratio) ** 0.5 // step * step) for ratio in (width / height, height / width))
    return (width // step * step, height // step * step) if w >= width or h >= height else (w, h)


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
