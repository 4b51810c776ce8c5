"""The conditioning of the transformer: pytrees with a leading batch axis (but `Shared`), None for absent parts.

Variants differ in the parts they have; loop and guidance treat all of them as one pytree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """Arrays without a batch axis, which all examples and both branches of guidance have in common."""

    value: Any


def map_batched(function: Callable[..., Any], tree: Any, *more: Any) -> Any:
    """`jax.tree.map` over the arrays with a batch axis; a `Shared` of `tree` stays as it is."""

    def call(node: Any, *others: Any) -> Any:
        return node if isinstance(node, Shared) else function(node, *others)

    return jax.tree.map(call, tree, *more, is_leaf=lambda node: isinstance(node, Shared))


class KeysValues(NamedTuple):
    """Keys and values of every layer's cross-attention to one source; activation dtype."""

    keys: Float[Array, "b layers k n d"]
    values: Float[Array, "b layers k n d"]


class Frames(NamedTuple):
    """Conditioning frames on the grid of the latents, fp32.

    Attributes:
      channels: concatenated to the latents' channels (image to video: mask and encoded frames).
      first: clean latents that replace the first frames at timestep 0, and stay in the result.
    """

    channels: Float[Array, "b f h w c"] | None = None
    first: Float[Array, "b f h w c"] | None = None

    def keep(self, latents: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        """The latents with `first` as their first frames."""
        if self.first is None:
            return latents
        return jnp.concatenate([self.first.astype(latents.dtype), latents[:, self.first.shape[1] :]], axis=1)

    def input(self, latents: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c_in"]:
        """The input of the patch embedding."""
        latents = self.keep(latents)
        return latents if self.channels is None else jnp.concatenate([latents, self.channels], axis=-1)


class Context(NamedTuple):
    """The encoders' outputs, as `conditioning` makes them.

    Attributes:
      text: hidden states of the text encoder, zeros after the prompt's length.
      image: hidden states of the image encoder; two images follow each other.
      frames: conditioning frames on the grid of the latents.
      adapter: `vace.Control`, `animate.Performance`, `animate2.Driving` or `s2v.Speech`.
    """

    text: Float[Array, "b k e_text"]
    image: Float[Array, "b k e_image"] | None = None
    frames: Frames = Frames()
    adapter: Any = ()


class PreparedContext(NamedTuple):
    """`Context` after `WanTransformer.prepare`, which computes what does not depend on latents and timestep.

    Attributes:
      sources: keys and values of the cross-attentions: the text's, then the image's if any.
      frames: as in `Context`.
      adapter: `vace.PreparedControl`, `animate.PreparedPerformance`, `animate2.PreparedDriving` or
        `s2v.PreparedSpeech`.
    """

    sources: tuple[KeysValues, ...]
    frames: Frames = Frames()
    adapter: Any = ()

    def cut(self, take: Callable[[jax.Array], jax.Array]) -> PreparedContext:
        """The context of some latent frames, which `take` takes of an array b f ..."""
        adapter = self.adapter.cut(take) if self.adapter else self.adapter
        return self._replace(frames=jax.tree.map(take, self.frames), adapter=adapter)


class Contexts(NamedTuple):
    """Conditioning of the two branches of classifier-free guidance: pytrees of one structure, the batch leading.

    Attributes:
      positive: of the prompt.
      negative: of the negative prompt, see `without_shared`; None without guidance.
    """

    positive: Any
    negative: Any = None


def without_shared(context: Any) -> Any:
    """The context of the negative branch, whose `Shared` arrays are in the positive one alone."""
    return jax.tree.map(
        lambda node: Shared(None) if isinstance(node, Shared) else node,
        context,
        is_leaf=lambda node: isinstance(node, Shared),
    )
