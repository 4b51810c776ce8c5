"""A kind of conditioning beside the text, as a value: how it is read, encoded, and known by shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from PIL import Image

from maxdiffusion.request import Job, Video
from maxdiffusion.request.session import Session

Grid = tuple[int, int, int]
Images = Mapping[str, Image.Image]


class Shapes(NamedTuple):
    """What a kind of conditioning gives each of some videos, in shapes, and what the encoders run on for all of them.

    Attributes:
      fields: of `Context`, as ShapeDtypeStructs without the batch axis.
      encoded: (frames, height, width) -> how many such videos the VAE encodes.
      images: how many images go through the image encoder.
    """

    fields: Mapping[str, Any]
    encoded: Mapping[tuple[int, int, int], int]
    images: int = 0


NOTHING = Shapes({}, {})


class Kind(NamedTuple):
    """A kind of conditioning; `Task.conditions` names those of a variant.

    Attributes:
      read: (the run, its images by location, RGB) -> the contents of its files, checked as far as possible without a
        network; None where none is given.
      encode: (session, what was read) -> for each video its part of the conditioning, a pytree without the batch axis.
      field: of `Context`, to which that part belongs; or START, or SEGMENT.
      shapes: (the run, videos of one shape, the networks' configs, latent grid of a segment) -> what `encode` makes of
        them, in shapes; nothing where `read` finds nothing.
    """

    read: Callable[[Job, Images], Any]
    encode: Callable[[Session, Any], Sequence[Any]]
    field: str
    shapes: Callable[[Job, Sequence[Video], Mapping[str, Any], Grid], Shapes]


# Not fields of `Context`: what denoising starts from, and what the fields of each segment are made of.
START, SEGMENT = "start", "segment"


def fp32(*shape: int) -> Any:
    """The ShapeDtypeStruct of an fp32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)
