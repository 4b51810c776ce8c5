"""The tensors of one net in a file, an index of shards or a folder, which may hold other nets beside it or instead.

Imports no jax.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping

from maxdiffusion.errors import UserError
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.weights import naming
from maxdiffusion.weights.headers import read_tensors
from maxdiffusion.weights.sources import TensorSource
from maxdiffusion.weights.tables import original


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a net is recognised.

    Attributes:
      what: its name, for messages.
      original: the names of the official repositories and of community files.
      signature: diffusers names of which every such net has one and no other net has any.
      prefix: regular expression of what its names begin with in a file of a whole pipeline.
    """

    what: str
    original: original.Table
    signature: tuple[str, ...]
    prefix: str


# Prefixes: those of ComfyUI's CheckpointSave for WAN and for older models. A vision tower has none there.
_CLASS = "embeddings.class_embedding"
_PROJECTION = "feature_projection.projection.weight"
_TRANSFORMER = _Kind("transformer", original.TRANSFORMER, ("patch_embedding.weight",), r"model\.diffusion_model\.")
KINDS = {  # by the nets' folders
    "transformer": _TRANSFORMER,
    "transformer_2": _TRANSFORMER,
    "text_encoder": _Kind(
        "text encoder",
        original.TEXT_ENCODER,
        ("encoder.final_layer_norm.weight",),
        r"(text_encoders|cond_stage_model)\.(umt5xxl\.)?(transformer\.)?",
    ),
    "vae": _Kind("VAE", original.VAE, ("decoder.conv_in.weight",), r"(vae|first_stage_model)\."),
    "image_encoder": _Kind(
        "image encoder", original.CLIP, (_CLASS, f"vision_model.{_CLASS}"), r"(?=vision_model\.|visual\.)"
    ),
    "audio_encoder": _Kind("audio encoder", {}, (_PROJECTION, f"wav2vec2.{_PROJECTION}"), r"(?=wav2vec2\.)"),
}
_LORA = re.compile(r".*(\blora_|\.lora\.|\.lokr_|\.hada_|\.diff(_b|_m)?$)")


def read(path: AnyPath, net: str, given: bool = True) -> tuple[dict[str, TensorSource], dict[str, int]]:
    """The tensors of one net by their diffusers names, and how many tensors of other nets are left, by their nets.

    Args:
      path: a file, an index of shards or a folder with either.
      net: its folder in a checkpoint, a key of KINDS.
      given: whether `path` was given as NET_file, so that it may hold anything.

    Raises:
      UserError: it does not exist, cannot be read or does not hold this net; the message says what it holds instead.
    """
    if given and not path.exists():
        raise UserError(f"{net}_file={path} does not exist; give the path of a .safetensors or .gguf file.")
    stored = read_tensors(path)
    own, left = _part(stored, net)
    tensors = naming.normalised(own, KINDS[net].original)
    if given and not tensors.keys() & {*KINDS[net].signature}:
        raise UserError(f"{net}_file={path} {_instead(path, stored, KINDS[net])}.")
    return tensors, left


def listed(left: Mapping[str, int]) -> str:
    """The nets that `read` left in a file, for messages: `VAE (194 tensors), text encoder (242 tensors)`."""
    return ", ".join(f"{what} ({count} tensors)" for what, count in left.items())


def _part(tensors: Mapping[str, TensorSource], net: str) -> tuple[dict[str, TensorSource], dict[str, int]]:
    """The tensors that do not belong to another net, without the net's prefix, and the number of the others."""
    own: dict[str, TensorSource] = {}
    left: collections.Counter[str] = collections.Counter()
    for name, tensor in tensors.items():
        owner = next((other for other, kind in KINDS.items() if re.match(kind.prefix, name)), net)
        if KINDS[owner] is KINDS[net]:
            own[re.sub(rf"^{KINDS[net].prefix}", "", name)] = tensor
        else:
            left[KINDS[owner].what] += 1
    return own, dict(left)


def _instead(path: AnyPath, tensors: Mapping[str, TensorSource], wanted: _Kind) -> str:
    """What a file without the wanted net holds, and what can be done with it."""
    if any(map(_LORA.match, tensors)):
        return f"is a LoRA, which changes a model and does not replace its weights; give it as lora={path}"
    for net, kind in KINDS.items():
        names = (name for name, _ in naming.renamed(naming.bare(_part(tensors, net)[0]), kind.original))
        if {*names} & {*kind.signature}:
            return f"holds the weights of the {kind.what}, not of the {wanted.what}; give it as {net}_file={path}"
    some = ", ".join([*tensors][:3]) or "none"
    return (
        f"holds {len(tensors)} tensors ({some}, ...), which are not those of a WAN {wanted.what}; give the file of one"
    )
