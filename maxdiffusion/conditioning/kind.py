"""A kind of conditioning beside the text, as a value: how to read it, encode it and get its shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.request import Job, Video
from maxdiffusion.request.session import Session

Grid = tuple[int, int, int]
Images = Mapping[str, Image.Image]


class Shapes(NamedTuple):
    """Shapes of a kind of conditioning for each video, and the number of encoder calls for all videos.

    Attributes:
      fields: of `Context`, as ShapeDtypeStructs without the batch axis.
      encoded: (frames, height, width) -> number of such videos that the VAE encodes.
      images: number of images for the image encoder.
    """

    fields: Mapping[str, Any]
    encoded: Mapping[tuple[int, int, int], int]
    images: int = 0


NOTHING = Shapes({}, {})


class ClipStart(NamedTuple):
    """What a clip starts from.

    Attributes:
      video: of which it is a clip.
      number: of the clip, from 0.
      last: whether it is the video's last clip.
      frames: its first frames, those of the clip before or of `extend`, [-1, 1]; None where it starts from the video's
        own image.
    """

    video: Video
    number: int
    last: bool
    frames: Float[np.ndarray, "f h w 3"] | None


# The latents of a segment, b f h w c -> its frames in chunks.
Decode = Callable[[np.ndarray], Iterator[jax.Array]]


class Kind(NamedTuple):
    """A kind of conditioning; `Task.conditions` names those of a variant.

    Attributes:
      read: (the run, its images by location, RGB) -> the contents of its files, checked as far as possible without a
        network; None where none is given.
      encode: (session, what was read) -> for each video its part of the conditioning, a pytree of host arrays without
        the batch axis.
      field: of `Context`, to which that part belongs; or START, or SEGMENT.
      shapes: (the run, videos of one shape, the networks' configs, latent grid of a segment) -> the shapes of
        `encode`'s result; none where `read` finds nothing.
      clip: (session, what was read, the VAE, where clips start) -> what `encode` makes, of one clip of each of these
        videos; of tasks that are `chained`.
      performer: (session, what was read, hidden states of the text encoder by prompt) -> an object whose `fields` makes
        the fields of `Context` of each segment, of the kind whose field is SEGMENT.
      decoding: (session, the VAE, what was read, videos) -> the result of `conditioning.decoding`, where segments are
        not decoded each by itself.
    """

    read: Callable[[Job, Images], Any]
    encode: Callable[[Session, Any], Sequence[Any]]
    field: str
    shapes: Callable[[Job, Sequence[Video], Mapping[str, Any], Grid], Shapes]
    clip: Callable[[Session, Any, WanVAE, Sequence[ClipStart]], Sequence[Any]] | None = None
    performer: Callable[[Session, Any, Mapping[str, Any]], Any] | None = None
    decoding: Callable[[Session, WanVAE, Any, Sequence[Video]], Decode] | None = None


# Not fields of `Context`: the initial latents, and the input of a `performer` for each segment.
START, SEGMENT = "start", "segment"


def fp32(*shape: int) -> Any:
    """The ShapeDtypeStruct of an fp32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)
