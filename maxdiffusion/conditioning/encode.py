"""All that a run's videos are conditioned on, encoded once, one encoder in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from maxdiffusion import variants
from maxdiffusion.conditioning import text
from maxdiffusion.config import Config
from maxdiffusion.config.examples import Example, examples
from maxdiffusion.denoise.guidance import Contexts
from maxdiffusion.models.dit import Context
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.weights.nets import Nets

# A kind of conditioning: for each video its value of one field of `Context`, a pytree without the batch axis.
Kind = Callable[[Config, Nets, Stages, Sequence[Example]], Sequence[Any]]

# `WanSpec.conditions` names what a variant has of these beside the text: name -> (field of `Context`, kind).
KINDS: Mapping[str, tuple[str, Kind]] = {}


class Conditioning:
    """What every video of a run is conditioned on."""

    def __init__(self, by_prompt: Mapping[str, jax.Array], parts: Mapping[Example, Mapping[str, Any]]) -> None:
        """`by_prompt` holds text embeddings, k e_text in fp32; `parts` the other fields of each video's `Context`."""
        self._by_prompt = by_prompt
        self._parts = parts

    def contexts(self, videos: Sequence[Example], guided: bool) -> Contexts:
        """Those of one batch; without guidance there is no negative side, which shares all but the text."""
        parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(self._parts[video] for video in videos))

        def context(prompts: Sequence[str]) -> Context:
            return Context(jnp.stack([self._by_prompt[prompt] for prompt in prompts]), **parts)

        positive = context([video.prompt for video in videos])
        return Contexts(positive, context([video.negative_prompt for video in videos]) if guided else None)


def encode(cfg: Config, nets: Nets, stages: Stages, guided: bool) -> Conditioning:
    """Loads each encoder that the variant has, encodes each different input and frees the encoder again."""
    videos = examples(cfg)
    parts: dict[Example, dict[str, Any]] = {video: {} for video in videos}
    for name in variants.get(cfg.model_name).conditions:
        field, kind = KINDS[name]
        for video, value in zip(videos, kind(cfg, nets, stages, videos), strict=True):
            parts[video][field] = value
    wanted = [video.prompt for video in videos] + [video.negative_prompt for video in videos if guided]
    return Conditioning(_encode_prompts(list(dict.fromkeys(wanted)), nets, stages), parts)


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
