"""Attention of the video's tokens to the few tokens of another signal in their own latent frame."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def frame_attention(
    q: Float[Array, "b s n d"],
    keys: Float[Array, "b k n d"],
    values: Float[Array, "b k n d"],
    tokens_per_frame: int,
    keys_per_frame: int,
) -> Float[Array, "b s n d"]:
    """Softmax attention in which a query has the keys of its own frame; fp32 out.

    The references fold the frames into the batch. Here devices split the tokens without regard to frames, so the keys
    of all frames (105 of a face at 77 frames; the text has 512) are there, and those of other frames are masked.
    Queries after the last frame have its keys, so that every row has one.
    """
    logits = jnp.einsum("bsnd,bknd->bsnk", q, keys, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    frames = jnp.arange(keys.shape[1]) // keys_per_frame
    own = jnp.minimum(jnp.arange(q.shape[1]) // tokens_per_frame, frames[-1])[:, None] == frames
    weights = jax.nn.softmax(jnp.where(own[:, None], logits, -jnp.inf), axis=-1).astype(values.dtype)
    return jnp.einsum("bsnk,bknd->bsnd", weights, values, preferred_element_type=jnp.float32)
