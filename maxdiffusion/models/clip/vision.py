"""The CLIP vision tower (Radford et al., 2021, arXiv:2103.00020) up to the input of its last layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from maxdiffusion.media.resize import bicubic
from maxdiffusion.models.clip.config import CLIPVisionConfig
from maxdiffusion.models.layers import MLP, Dtypes, LayerNorm, Linear, parameter, scan, stack
from maxdiffusion.parallel import axes

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def preprocess(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]], size: int, view: Literal["squashed", "centre"]
) -> Float[np.ndarray, "b h w c"]:
    """Makes RGB images squares of `size` pixels, normalised by the channels' mean and deviation; fp32.

    Args:
      images: each in its own size.
      size: the encoder's `image_size`.
      view: the whole image squashed, bicubic without antialiasing (`CLIPModel.visual` of the official repository), or
        the short side resized to `size` and the centre cropped (`transformers.CLIPImageProcessor`).
    """
    square = {"squashed": _squashed, "centre": _centre}[view]
    return (np.stack([square(image, size) for image in images]) - MEAN) / STD


def _squashed(image: UInt8[np.ndarray, "_ _ 3"], size: int) -> Float[np.ndarray, "size size 3"]:
    return bicubic(image, size, size) / np.float32(255)


def _centre(image: UInt8[np.ndarray, "_ _ 3"], size: int) -> Float[np.ndarray, "size size 3"]:
    whole = Image.fromarray(image)
    width, height = (max(size, int(size * side / min(whole.size))) for side in whole.size)
    left, top = (width - size) // 2, (height - size) // 2
    small = whole.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels: Any = np.asarray(small, np.float32)
    return pixels / np.float32(255)


class Attention(nnx.Module):
    """Self-attention among the patches of an image."""

    def __init__(self, config: CLIPVisionConfig, dtypes: Dtypes):
        self.heads, dim = config.num_attention_heads, config.hidden_size
        self.q_proj = Linear(dim, dim, (axes.EMBED, axes.HEADS), dtypes)
        self.k_proj = Linear(dim, dim, (axes.EMBED, axes.HEADS), dtypes)
        self.v_proj = Linear(dim, dim, (axes.EMBED, axes.HEADS), dtypes)
        self.out_proj = Linear(dim, dim, (axes.HEADS, axes.EMBED), dtypes)

    def __call__(self, x: Float[Array, "b k e"]) -> Float[Array, "b k e"]:
        b, length, e = x.shape
        q, k, v = (project(x).reshape(b, length, self.heads, -1) for project in (self.q_proj, self.k_proj, self.v_proj))
        logits = jnp.einsum("bsnd,bknd->bnsk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum("bnsk,bknd->bsnd", weights, v, preferred_element_type=jnp.float32)
        return self.out_proj(out.reshape(b, length, e))


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward; the residual stream is fp32."""

    def __init__(self, config: CLIPVisionConfig, dtypes: Dtypes):
        dim, gelu = config.hidden_size, functools.partial(jax.nn.gelu, approximate=False)
        self.layer_norm1 = LayerNorm(dim, config.layer_norm_eps)
        self.self_attn = Attention(config, dtypes)
        self.layer_norm2 = LayerNorm(dim, config.layer_norm_eps)
        self.mlp = MLP(dim, config.intermediate_size, dim, gelu, dtypes)

    def __call__(self, x: Float[Array, "b k e"]) -> Float[Array, "b k e"]:
        x = x + self.self_attn(self.layer_norm1(x)).astype(jnp.float32)
        return x + self.mlp(self.layer_norm2(x)).astype(jnp.float32)


class CLIPVision(nnx.Module):
    """Reference: `transformers.CLIPVisionModel`. Layers are stored stacked; see `WanTransformer` for `scan_layers`."""

    def __init__(self, config: CLIPVisionConfig, dtypes: Dtypes, scan_layers: bool = True):
        self.config = config
        self.unroll = not scan_layers
        dim = config.hidden_size
        self.class_embedding = parameter((dim,), jnp.float32)
        self.patch_embedding = Linear(3 * config.patch_size**2, dim, (None, axes.EMBED), dtypes, use_bias=False)
        self.position_embedding = parameter((config.tokens, dim), jnp.float32)
        self.pre_norm = LayerNorm(dim, config.layer_norm_eps)
        self.layers = stack(lambda: Layer(config, dtypes), config.num_hidden_layers)

    def __call__(self, pixels: Float[Array, "b h w c"]) -> Float[Array, "b k e"]:
        """The input of the last layer, fp32: class token, then patches. `pixels` come from `preprocess`."""
        b, side, _, c = pixels.shape
        p = self.config.patch_size
        patches = pixels.reshape(b, side // p, p, side // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)
        first = jnp.broadcast_to(self.class_embedding[...], (b, 1, self.config.hidden_size))
        x = jnp.concatenate([first, self.patch_embedding(patches).astype(jnp.float32)], axis=1)
        x = self.pre_norm(x + self.position_embedding[...])
        _, before = scan(self.layers, lambda layer, x, _: (layer(x), x), x, None, self.unroll)
        return before[-1]
