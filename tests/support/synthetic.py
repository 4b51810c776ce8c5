"""A small net with every kind of parameter that a name table knows, and its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from maxdiffusion.models.layers import parameter, stack
from maxdiffusion.parallel import axes
from maxdiffusion.weights.rule import Rule, Transform

LAYERS, EMBED, MLP = 3, 16, 24

RULES = (
    Rule("shared.weight", "embed.embedding", aliases=("encoder.embed_tokens.weight",)),
    Rule("patch.weight", "patch.kernel", Transform.CONV3D),
    Rule("patch.bias", "patch.bias"),
    Rule("blocks.{layer}.ffn.weight", "blocks.ffn.kernel", Transform.LINEAR),
    Rule("blocks.{layer}.ffn.bias", "blocks.ffn.bias"),
    Rule("blocks.{layer}.norm.gamma", "blocks.norm.scale", reshape=True),
    Rule("heads.{i}.weight", "heads.{i}.kernel", Transform.LINEAR),
    Rule("image_embedder.weight", "image_embedder.kernel", Transform.LINEAR),  # of another variant: the net has none
)


class Leaf(nnx.Module):
    """Parameters given as name=(shape, logical axes, dtype)."""

    def __init__(self, **params: tuple[tuple[int, ...], tuple[str | None, ...], jnp.dtype]):
        for name, (shape, names, dtype) in params.items():
            setattr(self, name, parameter(shape, dtype, *names))


class Block(nnx.Module):
    def __init__(self, dtype: jnp.dtype):
        self.ffn = Leaf(kernel=((EMBED, MLP), (axes.EMBED, axes.MLP), dtype), bias=((MLP,), (axes.MLP,), dtype))
        self.norm = Leaf(scale=((EMBED,), (None,), jnp.float32))


class Net(nnx.Module):
    def __init__(self, dtype: jnp.dtype = jnp.float32, layers: int = LAYERS):
        self.embed = Leaf(embedding=((40, EMBED), (axes.VOCAB, axes.EMBED), dtype))
        self.patch = Leaf(
            kernel=((1, 2, 2, 4, EMBED), (None, None, None, None, axes.EMBED), dtype), bias=((EMBED,), (None,), dtype)
        )
        self.blocks = stack(lambda: Block(dtype), layers)
        self.heads = nnx.List([Leaf(kernel=((EMBED, 8), (axes.EMBED, None), dtype)) for _ in range(2)])


def tensors(seed: int = 0, dtype: np.dtype | type = np.float32) -> dict[str, np.ndarray]:
    """The net's checkpoint: torch names, torch layouts."""
    shapes = {
        "shared.weight": (40, EMBED),
        "patch.weight": (EMBED, 4, 1, 2, 2),
        "patch.bias": (EMBED,),
        **{f"blocks.{i}.ffn.weight": (MLP, EMBED) for i in range(LAYERS)},
        **{f"blocks.{i}.ffn.bias": (MLP,) for i in range(LAYERS)},
        **{f"blocks.{i}.norm.gamma": (EMBED, 1, 1) for i in range(LAYERS)},
        **{f"heads.{i}.weight": (8, EMBED) for i in range(2)},
    }
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def expected(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each parameter must hold, spelled out by hand."""
    return {
        "embed.embedding": stored["shared.weight"],
        "patch.kernel": stored["patch.weight"].transpose(2, 3, 4, 1, 0),
        "patch.bias": stored["patch.bias"],
        "blocks.ffn.kernel": np.stack([stored[f"blocks.{i}.ffn.weight"].T for i in range(LAYERS)]),
        "blocks.ffn.bias": np.stack([stored[f"blocks.{i}.ffn.bias"] for i in range(LAYERS)]),
        "blocks.norm.scale": np.stack([stored[f"blocks.{i}.norm.gamma"][:, 0, 0] for i in range(LAYERS)]),
        "heads.0.kernel": stored["heads.0.weight"].T,
        "heads.1.kernel": stored["heads.1.weight"].T,
    }


def write_net(folder: Path, stored: dict[str, np.ndarray], shards: int = 1, stem: str = "diffusion_pytorch_model"):
    """Saves as one file, or as shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(stored, folder / f"{stem}.safetensors")
        return
    weight_map = {}
    for i in range(shards):
        part = {name: stored[name] for name in list(stored)[i::shards]}
        file = f"{stem}-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
