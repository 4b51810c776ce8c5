"""The choices in which the official code (Wan2.1, Wan2.2) and diffusers 0.42.1 differ, as one table.

The networks of both agree to a few 1e-6; noise levels, resizing, sizes and the order of references do not. `OFFICIAL`
is the default of `conventions`; docs/conventions.md is the same table in words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Levels = Literal["official", "diffusers"]


@dataclasses.dataclass(frozen=True)
class Conventions:
    """One row for each key of `conventions`.

    Attributes:
      name: the value of the key.
      levels: noise levels and timesteps of the solvers, see `denoise.schedule`.
      clip_view: the image that CLIP sees: the whole one squashed to a square (bicubic), or its centre crop.
      start_image: resizing of the first and last image: bicubic without antialiasing, or Lanczos (TI2V's in both).
      character: resizing of Animate's character: bilinear, as OpenCV, or Lanczos.
      size: what `size=W*H` means beside an image: an area in the image's proportions, or exactly W x H.
      references: VACE's references on the frame axis: as named, scaled from their own size; or reversed, scaled from
        multiples of the VAE's stride.
      control_resize: VACE's control video in another size: covering it, bicubic, and cropped; or stretched, Lanczos.
      control_frames: frames of a VACE control video longer than the result: spread over all of it, or its first; the
        default of `input_frames`.
      bars: where Animate 2's result ends: where the image on black does, or where it would with its sides rounded down
        to multiples of 16 (there is no official code).
    """

    name: Literal["official", "diffusers"]
    levels: Levels
    clip_view: Literal["squashed", "centre"]
    start_image: Literal["bicubic", "lanczos"]
    character: Literal["bilinear", "lanczos"]
    size: Literal["area", "exact"]
    references: Literal["as_named", "reversed"]
    control_resize: Literal["covered", "stretched"]
    control_frames: Literal["spread", "first"]
    bars: Literal["image", "rounded"]


OFFICIAL = Conventions(
    name="official",
    levels="official",
    clip_view="squashed",
    start_image="bicubic",
    character="bilinear",
    size="area",
    references="as_named",
    control_resize="covered",
    control_frames="spread",
    bars="image",
)
DIFFUSERS = Conventions(
    name="diffusers",
    levels="diffusers",
    clip_view="centre",
    start_image="lanczos",
    character="lanczos",
    size="exact",
    references="reversed",
    control_resize="stretched",
    control_frames="first",
    bars="rounded",
)

CONVENTIONS: Mapping[str, Conventions] = {row.name: row for row in (OFFICIAL, DIFFUSERS)}
