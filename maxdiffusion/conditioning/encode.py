"""All that a run's videos are conditioned on, encoded once, one encoder in memory at a time."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from maxdiffusion import variants
from maxdiffusion.conditioning import animate, images, start, text, vace
from maxdiffusion.conditioning.described import Described, Grid
from maxdiffusion.config import Config
from maxdiffusion.config.examples import Example
from maxdiffusion.models.dit import Context
from maxdiffusion.models.dit.context import Contexts
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.weights.nets import Nets

# No fields of `Context`: what denoising starts from, and of what a long video makes its fields part by part.
START, PERFORMANCE = "start", animate.PERFORMANCE


class Kind(NamedTuple):
    """A kind of conditioning beside the text; `WanSpec.conditions` names those of a variant.

    Attributes:
      read: (cfg, videos) -> what the files hold, checked as far as it can be without a network; None where none is
        given.
      encode: (cfg, nets, stages, videos, what was read) -> for each video its part of the conditioning, a pytree
        without the batch axis.
      field: of `Context`, to which that part belongs.
      describe: (cfg, videos of one shape, the nets' configs, latent frames, height and width of a part) -> what the
        videos are given in the end, in shapes; nothing where `read` finds nothing.
    """

    read: Callable[[Config, Sequence[Example]], Any]
    encode: Callable[[Config, Nets, Stages, Sequence[Example], Any], Sequence[Any]]
    field: str
    describe: Callable[[Config, Sequence[Example], Mapping[str, Any], Grid], Described]


KINDS: Mapping[str, Kind] = {
    "image_tokens": Kind(images.read_originals, images.encode_tokens, "image", images.tokens_described),
    "image_channels": Kind(images.read_fitted, images.encode_channels, "frames", images.channels_described),
    "first_frame": Kind(images.read_fitted, images.encode_first, "frames", images.first_described),
    "control": Kind(vace.read, vace.encode, "adapter", vace.described),
    START: Kind(start.read, start.encode, START, start.described),
    PERFORMANCE: Kind(animate.read, animate.encode, PERFORMANCE, animate.described),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the files hold that a run is conditioned on, by kind; only what is given."""

    by_kind: Mapping[str, Any]

    def digest(self) -> str:
        """Of all numbers."""
        leaves = jax.tree.leaves(self.by_kind)
        return hashlib.sha256(b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def read(cfg: Config, videos: Sequence[Example]) -> Inputs:
    """Reads and checks every file, before anything is loaded.

    Raises:
      UserError: a file is damaged, or not what the config says.
    """
    if cfg.decode_latents:
        return Inputs({})
    found = {name: KINDS[name].read(cfg, videos) for name in variants.get(cfg.model_name).conditions}
    return Inputs({name: given for name, given in found.items() if given is not None})


def describe(cfg: Config, videos: Sequence[Example], configs: Mapping[str, Any], grid: Grid) -> Described:
    """All that videos of one shape are conditioned on beside the text, as `encode` would make it."""
    found = [KINDS[name].describe(cfg, videos, configs, grid) for name in variants.get(cfg.model_name).conditions]
    return Described(
        {name: value for each in found for name, value in each.fields.items()},
        sum((Counter(each.encoded) for each in found), Counter()),
        sum(each.images for each in found),
    )


class Conditioning:
    """What every video of a run is conditioned on."""

    def __init__(
        self,
        by_prompt: Mapping[str, jax.Array],
        parts: Mapping[Example, Mapping[str, Any]],
        perform: animate.Perform = animate.still,
    ) -> None:
        """`by_prompt` holds text embeddings, k e_text in fp32; `parts` the other fields of each video's `Context`.

        `perform` adds the fields that differ from part to part of a long video.
        """
        self._by_prompt = by_prompt
        self._parts = parts
        self._perform = perform

    def contexts(
        self, videos: Sequence[Example], guided: bool, before: Sequence[Float[np.ndarray, "b f h w c"]] = ()
    ) -> Contexts:
        """Those of one batch; without guidance there is no negative side, which shares all but the text and a face.

        `before` holds the latents of the parts of these videos that are made already.
        """
        fields = self._stacked(videos)
        fields.pop(START, None)
        shown, hidden = self._perform(fields, before)

        def context(prompts: Sequence[str], fields: Mapping[str, Any]) -> Context:
            return Context(jnp.stack([self._by_prompt[prompt] for prompt in prompts]), **fields)

        positive = context([video.prompt for video in videos], shown)
        return Contexts(positive, context([video.negative_prompt for video in videos], hidden) if guided else None)

    def start(
        self, videos: Sequence[Example], noise: Float[Array, "b f h w c"], sigma: float
    ) -> Float[Array, "b f h w c"]:
        """What denoising starts from at the first noise level: the noise, or the videos that are changed with noise."""
        given = self._stacked(videos).get(START)
        return noise if given is None else sigma * noise + (1 - sigma) * given

    def _stacked(self, videos: Sequence[Example]) -> dict[str, Any]:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(self._parts[video] for video in videos))


def encode(
    cfg: Config, videos: Sequence[Example], nets: Nets, stages: Stages, guided: bool, inputs: Inputs
) -> Conditioning:
    """Loads each encoder that the variant has, encodes each different input and frees the encoder again."""
    parts: dict[Example, dict[str, Any]] = {video: {} for video in videos}
    for name, given in inputs.by_kind.items():
        for video, value in zip(videos, KINDS[name].encode(cfg, nets, stages, videos, given), strict=True):
            parts[video][KINDS[name].field] = value
    wanted = [video.prompt for video in videos] + [video.negative_prompt for video in videos if guided]
    by_prompt = _encode_prompts(list(dict.fromkeys(wanted)), nets, stages)
    if PERFORMANCE not in inputs.by_kind:
        return Conditioning(by_prompt, parts)
    return Conditioning(by_prompt, parts, animate.performer(cfg, nets, stages, inputs.by_kind[PERFORMANCE]))


def _encode_prompts(prompts: Sequence[str], nets: Nets, stages: Stages) -> dict[str, jax.Array]:
    with stages("text"):
        tokenizer = text.load_tokenizer(nets.folder / "tokenizer")
    encoder = stages.load(nets, "text_encoder")
    by_prompt = {}
    with stages("text", len(prompts), "prompts") as advance:
        for prompt in prompts:
            (by_prompt[prompt],) = jax.block_until_ready(text.encode_prompts(encoder, tokenizer, [prompt]))
            advance(1)
    return by_prompt
