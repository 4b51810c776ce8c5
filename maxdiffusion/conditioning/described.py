"""What conditioning gives a video, described before anything is read: for what is compiled ahead of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Grid = tuple[int, int, int]


class Described(NamedTuple):
    """What a kind of conditioning gives each of some videos, and what the encoders run on for all of them.

    Attributes:
      fields: of `Context`, as ShapeDtypeStructs without the batch axis.
      encoded: (frames, height, width) -> how many such videos the VAE encodes.
      images: how many images go through the image encoder.
    """

    fields: Mapping[str, Any]
    encoded: Mapping[tuple[int, int, int], int]
    images: int = 0


NOTHING = Described({}, {})


def full(*shape: int) -> Any:
    """A ShapeDtypeStruct of fp32."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)
