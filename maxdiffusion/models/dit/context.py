"""What the transformer is told beside latents and timestep. The batch leads in every leaf; None is an empty part.

A variant differs from another in which parts it has, not in code: all of them travel through loop and guidance as one
pytree, and the negative branch shares every part but the text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class KeysValues(NamedTuple):
    """Keys and values of every layer's cross-attention to one source; activation dtype."""

    keys: Float[Array, "b layers k n d"]
    values: Float[Array, "b layers k n d"]


class Frames(NamedTuple):
    """What is given on the grid of the latents, fp32.

    Attributes:
      channels: concatenated to the latents' channels (image to video: mask and encoded frames).
      first: the first latent frames themselves. They stand in place of the noise, at timestep 0, and in the result.
    """

    channels: Float[Array, "b f h w c"] | None = None
    first: Float[Array, "b f h w c"] | None = None

    def keep(self, latents: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        """The latents with the given first frames in their place."""
        if self.first is None:
            return latents
        return jnp.concatenate([self.first.astype(latents.dtype), latents[:, self.first.shape[1] :]], axis=1)

    def input(self, latents: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c_in"]:
        """What the patch embedding sees."""
        latents = self.keep(latents)
        return latents if self.channels is None else jnp.concatenate([latents, self.channels], axis=-1)


class Context(NamedTuple):
    """The encoders' outputs, as `conditioning` makes them.

    Attributes:
      text: hidden states of the text encoder, zeros after the prompt's length.
      image: hidden states of the image encoder; two images follow each other.
      frames: what is given on the grid of the latents.
      side: what `VACE` or `Animate` are controlled by.
    """

    text: Float[Array, "b k e_text"]
    image: Float[Array, "b k e_image"] | None = None
    frames: Frames = Frames()
    side: Any = ()


class PreparedContext(NamedTuple):
    """The same after `WanTransformer.prepare`, with all that does not depend on latents and timestep computed.

    Attributes:
      sources: what the cross-attention of every layer attends to, each by itself: the text, then the image if any.
      frames: as in `Context`.
      side: as `VACE` or `Animate` prepare it.
    """

    sources: tuple[KeysValues, ...]
    frames: Frames = Frames()
    side: Any = ()
