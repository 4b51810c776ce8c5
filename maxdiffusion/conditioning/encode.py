"""All prompts of a run, encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from maxdiffusion.conditioning import text
from maxdiffusion.config import Config
from maxdiffusion.config.examples import Example, examples
from maxdiffusion.denoise import Contexts
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.weights.nets import Nets


class Embeddings:
    """The text embedding, k e_text in fp32, of every prompt that the run needs."""

    def __init__(self, by_prompt: Mapping[str, jax.Array]) -> None:
        self._by_prompt = by_prompt

    def contexts(self, videos: Sequence[Example], guided: bool) -> Contexts:
        """Those of one batch, b k e_text; without guidance there is no negative side."""
        positive = jnp.stack([self._by_prompt[video.prompt] for video in videos])
        if not guided:
            return Contexts(positive)
        return Contexts(positive, jnp.stack([self._by_prompt[video.negative_prompt] for video in videos]))


def encode(cfg: Config, nets: Nets, stages: Stages) -> Embeddings:
    """Loads the text encoder, encodes each different prompt and frees the encoder again."""
    videos = examples(cfg)
    wanted = [video.prompt for video in videos]
    if cfg.guidance_scale != 1:
        wanted += [video.negative_prompt for video in videos]
    prompts = list(dict.fromkeys(wanted))
    with stages("text"):
        tokenizer = text.load_tokenizer(nets.folder / "tokenizer")
    encoder = stages.load(nets, "text_encoder")
    with stages("text", len(prompts), "prompts") as advance:
        by_prompt = {}
        for prompt in prompts:
            (by_prompt[prompt],) = jax.block_until_ready(text.encode_prompts(encoder, tokenizer, [prompt]))
            advance(1)
    return Embeddings(by_prompt)
