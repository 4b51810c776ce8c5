"""What the config.json files of the official checkpoints say, for runs that are described without them.

Names and shapes follow from it, so that programs can be compiled; tests/golden/manifests proves both right. The VAEs'
means and deviations of latents are numbers, not shapes, and left at 0 and 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.variants import WanSpec
from maxdiffusion.weights import specs

_UMT5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
_CLIP_VIT_H_14 = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_VAE_21 = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
_VAE_22 = {
    "is_residual": True,
    "patch_size": 2,
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
_TOKENS = {"image_dim": 1280, "added_kv_proj_dim": 5120}
_TRANSFORMER = {"ffn_dim": 13824, "out_channels": 16, "text_dim": 4096}

# What a variant's transformer adds to its `Dims` and to _TRANSFORMER.
_TRANSFORMERS: Mapping[str, Mapping[str, Any]] = {
    "wan2.1-t2v-1.3b": {"ffn_dim": 8960},
    "wan2.1-t2v-14b": {},
    "wan2.1-vace-1.3b": {"ffn_dim": 8960, "vace_in_channels": 96, "vace_layers": list(range(0, 30, 2))},
    "wan2.1-vace-14b": {"vace_in_channels": 96, "vace_layers": list(range(0, 40, 5))},
    "wan2.1-i2v-14b-480p": _TOKENS,
    "wan2.1-i2v-14b-720p": _TOKENS,
    "wan2.1-flf2v-14b": {**_TOKENS, "pos_embed_seq_len": 514},
    "wan2.2-t2v-a14b": {},
    "wan2.2-i2v-a14b": {},
    "wan2.2-ti2v-5b": {"ffn_dim": 14336, "out_channels": 48},
    "wan2.2-animate-14b": {**_TOKENS, "latent_channels": 16},
}


def configs(spec: WanSpec) -> dict[str, Any]:
    """The config of each net of a variant's official checkpoint, by its folder.

    Raises:
      UserError: the variant has no official checkpoint.
    """
    if spec.name not in _TRANSFORMERS or spec.dims is None:
        raise UserError(
            f"The variant {spec.name} has no official checkpoint that would tell its size; give "
            f"pretrained_model_name_or_path=FOLDER, or model_name={' or '.join(_TRANSFORMERS)}."
        )
    transformer = {
        **dataclasses.asdict(spec.dims),
        **_TRANSFORMER,
        **_TRANSFORMERS[spec.name],
        "_class_name": spec.task.transformer_class,
    }
    raw = {
        "text_encoder": _UMT5_XXL,
        "image_encoder": _CLIP_VIT_H_14,
        "transformer": transformer,
        "transformer_2": transformer,
        "vae": _VAE_21 if transformer["out_channels"] == 16 else _VAE_22,
    }
    return {net.folder: net.parse(raw[net.folder]) for net in specs.nets_of(spec)}
