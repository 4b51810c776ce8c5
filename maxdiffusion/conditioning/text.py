"""Prompts -> text embeddings, as the reference pipeline makes them."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from maxdiffusion import parallel
from maxdiffusion.conditioning.text_cache import TextCache
from maxdiffusion.errors import UserError
from maxdiffusion.models.umt5.encoder import UMT5Encoder
from maxdiffusion.request.session import Session
from maxdiffusion.runtime import distributed, paths
from maxdiffusion.runtime.paths import AnyPath

log = logging.getLogger(__name__)

MAX_LENGTH = 512  # tokens that the WAN transformer is given, zeros after the prompt's own
BUCKET = 64  # the encoder runs on the next multiple of this many tokens: at most eight programs, a fraction of the work


def clean(prompt: str) -> str:
    """Repairs mojibake, resolves HTML entities (twice: they come doubly escaped) and folds white space.

    Reference: `prompt_clean` in `diffusers.pipelines.wan.pipeline_wan`.
    """
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


class SentencePiece:
    """The tokenizer of a spiece.model, called as one of transformers; it appends the end token."""

    def __init__(self, file: Path) -> None:
        """Reads the model; sentencepiece raises OSError or RuntimeError for one that is damaged."""
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(file))
        self.pad_token_id = max(self._model.pad_id(), 0)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*self._model.encode(text), self._model.eos_id()]}


def load_tokenizer(folder: AnyPath) -> Any:
    """The tokenizer in `folder`: its tokenizer.json, or else its spiece.model.

    Both are read as they stand: transformers 5 rebuilds either for T5 and loses its byte fallback on the way.

    Raises:
      UserError: no tokenizer can be read from the folder.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        with paths.local(folder) as here:
            if not (here / "tokenizer.json").is_file() and (here / "spiece.model").is_file():
                return SentencePiece(here / "spiece.model")
            return PreTrainedTokenizerFast.from_pretrained(str(here), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds, bare Exception among them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"No tokenizer can be read from {folder} ({reason}); it needs a tokenizer.json or a spiece.model."
        ) from error


def tokenize(
    tokenizer: Any, prompts: Sequence[str], max_length: int = MAX_LENGTH
) -> tuple[Int[np.ndarray, "b k"], Bool[np.ndarray, "b k"]]:
    """Token ids, int32, and which of them are the prompt's, padded to the longest prompt's bucket.

    A prompt of more than `max_length` tokens is cut there, as the reference does, and a warning says so.
    """
    rows = []
    for prompt in prompts:
        text = clean(prompt)
        ids = tokenizer(text)["input_ids"]
        if len(ids) > max_length:
            log.warning(
                "The prompt has %d tokens and the model reads %d: the last %d are cut. It begins: %.60s",
                len(ids),
                max_length,
                len(ids) - max_length,
                text,
            )
            ids = [*ids[: max_length - 1], ids[-1]]  # keeps the end token
        rows.append(ids)
    longest = max((len(ids) for ids in rows), default=0)
    width = min(-(-longest // BUCKET) * BUCKET, max_length)
    token_ids = np.full((len(rows), width), tokenizer.pad_token_id or 0, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for row, ids in enumerate(rows):
        token_ids[row, : len(ids)] = ids
        valid[row, : len(ids)] = True
    return token_ids, valid


def encode(s: Session, prompts: Sequence[str]) -> dict[str, Float[np.ndarray, "k e"]]:
    """Each prompt's text embedding on the host, fp32, of its own tokens alone; the encoder is freed again.

    Where earlier runs have kept all of them, the encoder is not loaded.
    """
    cache = TextCache(s)
    embeddings = cache.read(prompts)
    new = [prompt for prompt in prompts if prompt not in embeddings]
    if embeddings:
        unloaded = "" if new else "; the text encoder is not loaded"
        log.info("text: %d of %d embeddings are those of earlier runs%s", len(embeddings), len(prompts), unloaded)
    if not new:
        return embeddings
    with s.stages("text"):
        tokenizer = load_tokenizer(s.nets.checkpoint.folder / "tokenizer")
    encoder = s.load("text_encoder")
    with s.stages("text", len(new), "prompts") as advance:
        for prompt in new:
            hidden, valid = _encode(encoder, tokenizer, [prompt], MAX_LENGTH)
            embeddings[prompt] = distributed.fetch(hidden)[0, : valid.sum()].copy()
            if len(embeddings[prompt]) < MAX_LENGTH:  # a prompt that was cut is to be said in each run
                cache.write(prompt, embeddings[prompt])
            advance(1)
    return embeddings


def padded(embeddings: Sequence[Float[np.ndarray, "_ e"]]) -> Float[np.ndarray, "b k e"]:
    """The embeddings of a batch as the transformer takes them: `MAX_LENGTH` tokens each, zeros after their own."""
    rows = np.zeros((len(embeddings), MAX_LENGTH, embeddings[0].shape[1]), np.float32)
    for row, embedding in zip(rows, embeddings, strict=True):
        row[: len(embedding)] = embedding
    return rows


def _run(graphdef: Any, params: Any, token_ids: jax.Array, valid: jax.Array) -> jax.Array:
    hidden = nnx.merge(graphdef, params)(token_ids, valid)
    return parallel.shard(jnp.where(valid[..., None], hidden, 0), parallel.axes.BATCH, None, None)


def program() -> Any:
    """The encoder under the current placement, jitted: (its graph, parameters, token ids, valid) -> hidden states."""
    return parallel.jit(_run, static_argnums=0)


def encode_prompts(
    encoder: UMT5Encoder, tokenizer: Any, prompts: Sequence[str], max_length: int = MAX_LENGTH
) -> Float[Array, "b k e"]:
    """Text embeddings, fp32 (b, max_length, e), zeros after each prompt's own tokens.

    Positions are relative and padding is never attended, so encoding the bucket alone gives the numbers that encoding
    all `max_length` tokens would.
    """
    hidden, _ = _encode(encoder, tokenizer, prompts, max_length)
    return jnp.pad(hidden, ((0, 0), (0, max_length - hidden.shape[1]), (0, 0)))


def _encode(
    encoder: UMT5Encoder, tokenizer: Any, prompts: Sequence[str], max_length: int
) -> tuple[jax.Array, np.ndarray]:
    """The prompts' hidden states and which tokens are theirs, both padded to the longest prompt's bucket."""
    token_ids, valid = tokenize(tokenizer, prompts, max_length)
    return program()(*nnx.split(encoder), token_ids, valid), valid
