"""The nets of a pipeline: where each lies, how its config is read and its tensors are named. Free of jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.models.clip.config import CLIPVisionConfig
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.umt5.config import UMT5Config
from maxdiffusion.models.vae.config import VAEConfig
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.variants import VARIANTS, WanSpec
from maxdiffusion.weights import dimensions, naming
from maxdiffusion.weights.checkpoint import Checkpoint, open_checkpoint
from maxdiffusion.weights.rule import Rule
from maxdiffusion.weights.sources import TensorSource
from maxdiffusion.weights.tables import clip, dit, original, umt5, vae


@dataclasses.dataclass(frozen=True)
class NetSpec:
    """One net of a pipeline."""

    folder: str
    class_name: str | tuple[str, ...]  # what its config.json must say, or one of it
    parse: Callable[[Mapping[str, Any]], Any]  # config.json -> the net's config
    rules: Sequence[Rule]
    original: original.Table  # the names of the official repository and of community files
    ignored: Sequence[str] = ()  # regular expressions of tensors that the net knowingly does not use


# The reference loads the first where a file has it and never uses it; the second are fixed blur filters.
_UNUSED = (r"blocks\.\d+\.attn2\.norm_added_q\.weight", r"motion_encoder\.enc\.net_app\.convs\.\d+\.\w+\.0\.kernel")

NETS = (
    NetSpec(
        "text_encoder",
        "UMT5EncoderModel",
        UMT5Config.from_json,
        umt5.RULES,
        original.UMT5,
        ("spiece_model",),  # the tokenizer, in files for ComfyUI
    ),
    NetSpec(
        "image_encoder",
        ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        CLIPVisionConfig.from_json,
        clip.RULES,
        original.CLIP,
        clip.IGNORED,
    ),
    NetSpec("transformer", "WanTransformer3DModel", DiTConfig.from_json, dit.RULES, original.DIT, _UNUSED),
    NetSpec("transformer_2", "WanTransformer3DModel", DiTConfig.from_json, dit.RULES, original.DIT, _UNUSED),
    NetSpec("vae", "AutoencoderKLWan", VAEConfig.from_json, vae.RULES, original.VAE),
)


def nets_of(variant: WanSpec) -> tuple[NetSpec, ...]:
    """The nets that a variant's checkpoint holds."""
    return tuple(
        dataclasses.replace(net, class_name=variant.task.transformer_class)
        if net.folder.startswith("transformer")
        else net
        for net in NETS
        if net.folder in variant.nets
    )


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """An opened checkpoint whose configs are understood; no weight was read."""

    specs: Mapping[str, NetSpec]  # by folder, as the rest
    files: Checkpoint
    configs: Mapping[str, Any]  # the nets' own config dataclasses
    tensors: Mapping[str, Mapping[str, TensorSource]]  # by their diffusers names


def open_pipeline(
    folder: AnyPath, variant: WanSpec = VARIANTS["wan2.1-t2v"], files: Mapping[str, AnyPath] | None = None
) -> Pipeline:
    """Opens a local checkpoint folder.

    Args:
      folder: the folder, in the diffusers layout.
      variant: says which nets and what class of pipeline it must hold.
      files: net -> what is read in place of the weights in its folder; a transformer's own tensors then say its size.

    Raises:
      UserError: a file is absent or damaged, a class is not the expected one, or a config is not supported.
    """
    specs = nets_of(variant)
    if "transformer_2" not in variant.nets and (folder / "transformer_2").is_dir():
        raise UserError(
            f"{folder} holds two experts (transformer and transformer_2), but {variant.name} has one; write "
            "model_name: wan2.2-t2v-a14b or wan2.2-i2v-a14b, or give another checkpoint."
        )
    files = files or {}
    for name in files.keys() - {spec.folder for spec in specs}:
        raise UserError(f"{name}_file={files[name]} is not used by a model without {name}; leave it out.")
    read = open_checkpoint(
        folder, {spec.folder: spec.class_name for spec in specs}, files, pipeline=variant.task.pipeline_class
    )
    raw = dict(read.configs)
    tensors = {spec.folder: naming.normalised(read.tensors[spec.folder], spec.original) for spec in specs}
    for name in files.keys() & {"transformer", "transformer_2"}:
        shapes = {key: tensor.shape for key, tensor in tensors[name].items()}
        raw[name] = dimensions.transformer_config(shapes, raw[name], str(files[name]))
    configs = {spec.folder: spec.parse(raw[spec.folder]) for spec in specs}
    return Pipeline({spec.folder: spec for spec in specs}, dataclasses.replace(read, configs=raw), configs, tensors)
