"""The nets' configs of the official checkpoints, for programs that are compiled without a checkpoint.

Names and shapes follow from them; tests/golden/manifests proves both right.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from maxdiffusion.config import Config
from maxdiffusion.errors import UserError
from maxdiffusion.models.clip.config import VIT_H_14
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.umt5.config import XXL
from maxdiffusion.models.vae.config import WAN21, WAN22
from maxdiffusion.runtime.paths import reach
from maxdiffusion.variants import VARIANTS, WanSpec, get
from maxdiffusion.weights import specs


def configs(spec: WanSpec) -> dict[str, Any]:
    """The config of each net of a variant's official checkpoint, by its folder.

    Raises:
      UserError: the variant has no official checkpoint.
    """
    if spec.hub_id is None or spec.network is None:
        raise UserError(
            f"The variant {spec.name} has no official checkpoint that would tell its size; give "
            "pretrained_model_name_or_path=FOLDER, or model_name="
            f"{' or '.join(name for name, each in VARIANTS.items() if each.hub_id)}."
        )
    transformer = DiTConfig.from_json({**spec.network, "_class_name": spec.transformer_class})
    nets = {
        "text_encoder": XXL,
        "image_encoder": VIT_H_14,
        "transformer": transformer,
        "transformer_2": transformer,
        "vae": WAN21 if transformer.out_channels == WAN21.z_dim else WAN22,
    }
    return {name: nets[name] for name in spec.nets}


def configs_of(cfg: Config) -> Mapping[str, Any]:
    """Those of a run: its checkpoint's where that is a folder, else the official ones of its variant.

    Raises:
      UserError: the folder's files are not what `cfg` says, or the variant has no official checkpoint.
    """
    if reach(os.path.expanduser(cfg.pretrained_model_name_or_path)).is_dir():
        return specs.open_config(cfg, fetch=False).configs
    return configs(get(cfg.model_name))
