"""A transformer's config.json from the shapes of its tensors, for a file without one. Imports no jax."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.weights import net_file

HEAD_DIM = 128  # of every official WAN transformer
IMAGE_DIM = 1280  # of the image encoder's hidden states, in Animate 2

# Modules of VideoX-Fun's models that are not computed here -> what they are.
_FUN = {
    "control_adapter": "Fun-Camera, whose camera adapter",
    "ref_conv": "Fun-Control, whose embedding of a reference image",
}


# Keys of the official S2V's config.json, and of Animate 2's -> those of the diffusers layout.
_OWN = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
_OWN |= {key: key for key in ("num_layers", "ffn_dim", "freq_dim", "text_dim", "eps", "patch_size")}
_S2V = {key: key for key in ("audio_dim", "audio_inject_layers", "num_audio_token", "cond_dim")}
# Their other keys that change what is computed, in the configuration of the official checkpoints.
_ANIMATE2 = {"refer_offset_t": 1, "refer_offset_h": 0, "refer_offset_w": -1, "refer_stride": 1, "text_len": 512}
_ANIMATE2 |= {"cross_attn_norm": True, "use_img_emb": True}
_ONLY = {"enable_adain": True, "adain_mode": "attn_norm", "zero_timestep": True, "enable_motioner": False}
_ONLY |= {"enable_tsm": False, "enable_framepack": True, "framepack_drop_mode": "padd", "add_last_motion": True}


def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's config.json by the keys of the diffusers layout; the official S2V's and Animate 2's differ.

    Raises:
      UserError: one of these has another configuration than that of the official checkpoint.
    """
    only: Mapping[str, Any]
    match config.get("_class_name"):
        case "WanModel_S2V":
            base = {"_class_name": "WanS2VTransformer3DModel", "in_channels": 16, "out_channels": 16, "text_dim": 4096}
            names, only = _OWN | _S2V, _ONLY
        case "WanAnimate2Transformer3DModel":
            base = {"_class_name": "WanAnimate2Transformer3DModel", "image_dim": IMAGE_DIM}
            names, only = _OWN, _ANIMATE2
        case _:
            return dict(config)
    for key, value in only.items():
        if config.get(key, value) != value:
            raise UserError(f"The transformer's config.json gives {key}={config[key]!r}; supported is {value!r}.")
    made = {names[key]: value for key, value in config.items() if key in names}
    if isinstance(config.get("dim"), int) and isinstance(config.get("num_heads"), int):
        made["attention_head_dim"] = config["dim"] // config["num_heads"]
        made |= {"added_kv_proj_dim": config["dim"]} if "image_dim" in base else {}
    return base | made


def read_config(path: AnyPath, base: Mapping[str, Any]) -> dict[str, Any]:
    """`transformer_config` of a `transformer_file`: a file, an index of shards or a folder, from its headers.

    Raises:
      UserError: it cannot be read, or does not hold a WAN transformer.
    """
    tensors, _ = net_file.read(path, "transformer")
    return transformer_config({name: tensor.shape for name, tensor in tensors.items()}, base, str(path))


def transformer_config(shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The keys of transformer/config.json that shapes determine, over those of `base`.

    Args:
      shapes: of all tensors, by their diffusers names.
      base: the config.json of a transformer of the same family, or empty; the head size, which does not follow from
        shapes, is read from it and is 128 otherwise.
      what: the file, for the message.

    Raises:
      UserError: a tensor that every WAN transformer has is absent, or has another number of axes; or the file has
        modules that are not computed here.
    """
    embedder = "condition_embedder"

    def shape(name: str, axes: int = 2) -> tuple[int, ...]:
        if name not in shapes:
            raise UserError(
                f"{what} has no tensor {name} under that name or its original one, so it is not a WAN transformer; "
                "give the file of one."
            )
        if len(shapes[name]) != axes:
            raise UserError(
                f"{what} stores {name} with shape {list(shapes[name])}, which has {axes} axes in a WAN transformer; "
                "give a file of the original shapes."
            )
        return shapes[name]

    for module, kind in _FUN.items():
        if any(name.startswith(f"{module}.") for name in shapes):
            raise UserError(
                f"{what} is a transformer of {kind} ({module}) is not computed here; give one of VACE-Fun, which "
                "follows a video too (model_name=wan2.2-vace-fun-a14b), or of Fun-InP."
            )
    dim, channels, *patch = shape("patch_embedding.weight", 5)
    head = base.get("attention_head_dim", HEAD_DIM)
    norm, positions = f"{embedder}.image_embedder.norm1.weight", f"{embedder}.image_embedder.pos_embed"
    image = shape(norm, 1)[0] if norm in shapes else None
    own = base.get("_class_name")
    config = {
        # Animate 2 has the tensors of image to video.
        "_class_name": own if own == "WanAnimate2Transformer3DModel" else "WanTransformer3DModel",
        "num_layers": _count(shapes, "blocks"),
        "num_attention_heads": dim // head,
        "attention_head_dim": head,
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0] // math.prod(patch),
        "patch_size": patch,
        "text_dim": shape(f"{embedder}.text_embedder.linear_1.weight")[1],
        "freq_dim": shape(f"{embedder}.time_embedder.linear_1.weight")[1],
        "image_dim": image,
        "added_kv_proj_dim": dim if image else None,
        "pos_embed_seq_len": shape(positions, 3)[1] if positions in shapes else None,
    }
    if count := _count(shapes, "vace_blocks"):
        config |= {
            "_class_name": "WanVACETransformer3DModel",
            "vace_layers": list(range(0, config["num_layers"], config["num_layers"] // count or 1)),
            "vace_in_channels": shape("vace_patch_embedding.weight", 5)[1],
        }
    if "pose_patch_embedding.weight" in shapes:
        config |= {
            "_class_name": "WanAnimateTransformer3DModel",
            "latent_channels": shape("pose_patch_embedding.weight", 5)[1],
        }
    if "casual_audio_encoder.weights" in shapes:
        tokens, audio_dim, _ = shape("casual_audio_encoder.encoder.conv1_local.conv.weight", 3)
        config |= {
            "_class_name": "WanS2VTransformer3DModel",
            "audio_dim": audio_dim,
            "audio_layers": shape("casual_audio_encoder.weights", 4)[1],
            "num_audio_token": tokens // (dim // 4),
            "cond_dim": shape("cond_encoder.weight", 5)[1],
        }
    return {**base, **config}


def _count(shapes: Mapping[str, Any], blocks: str) -> int:
    hits = [re.match(rf"{blocks}\.(\d+)\.", name) for name in shapes]
    return max((int(hit[1]) + 1 for hit in hits if hit), default=0)
