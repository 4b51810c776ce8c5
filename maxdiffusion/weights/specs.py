"""The nets of a pipeline: where each lies, how its config is read and its tensors are named. Free of jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.umt5.config import UMT5Config
from maxdiffusion.models.vae.config import VAEConfig
from maxdiffusion.variants import WanSpec
from maxdiffusion.weights.checkpoint import Checkpoint, open_checkpoint
from maxdiffusion.weights.rule import Rule
from maxdiffusion.weights.tables import dit, umt5, vae


@dataclasses.dataclass(frozen=True)
class NetSpec:
    """One net of a pipeline."""

    folder: str
    class_name: str  # what its config.json must say
    parse: Callable[[Mapping[str, Any]], Any]  # config.json -> the net's config
    rules: Sequence[Rule]
    ignored: Sequence[str] = ()  # regular expressions of tensors that the net knowingly does not use


TEXT_TO_VIDEO = (
    NetSpec("text_encoder", "UMT5EncoderModel", UMT5Config.from_json, umt5.RULES),
    # The reference loads `norm_added_q` where a file has it and never uses it.
    NetSpec(
        "transformer",
        "WanTransformer3DModel",
        DiTConfig.from_json,
        dit.RULES,
        (r"blocks\.\d+\.attn2\.norm_added_q\.weight",),
    ),
    NetSpec("vae", "AutoencoderKLWan", VAEConfig.from_json, vae.RULES),
)


def nets_of(variant: WanSpec) -> tuple[NetSpec, ...]:
    """The nets that a variant's checkpoint holds."""
    return tuple(
        dataclasses.replace(net, class_name=variant.transformer_class) if net.folder == "transformer" else net
        for net in TEXT_TO_VIDEO
    )


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """An opened checkpoint whose configs are understood; no weight was read."""

    specs: Mapping[str, NetSpec]  # by folder, as the rest
    files: Checkpoint
    configs: Mapping[str, Any]  # the nets' own config dataclasses


def open_pipeline(
    folder: Path, specs: Sequence[NetSpec] = TEXT_TO_VIDEO, pipeline_class: str = "WanPipeline"
) -> Pipeline:
    """Opens a local checkpoint folder.

    Raises:
      UserError: a file is absent or damaged, a class is not the expected one, or a config is not supported.
    """
    files = open_checkpoint(folder, {spec.folder: spec.class_name for spec in specs}, pipeline=pipeline_class)
    configs = {spec.folder: spec.parse(files.configs[spec.folder]) for spec in specs}
    return Pipeline({spec.folder: spec for spec in specs}, files, configs)
