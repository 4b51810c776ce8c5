"""The networks' configs of the official checkpoints, for programs that are compiled without a checkpoint.

The names and shapes that follow from them are tested against tests/golden/manifests.
"""

from __future__ import annotations

from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.models.clip.config import VIT_H_14
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.umt5.config import XXL
from maxdiffusion.models.vae.config import WAN21, WAN22
from maxdiffusion.models.wav2vec2.config import XLSR_53
from maxdiffusion.variants import VARIANTS, WanSpec


def configs(spec: WanSpec) -> dict[str, Any]:
    """The config of each network of a variant's official checkpoint, by its folder.

    Raises:
      UserError: the variant has no official checkpoint.
    """
    if spec.hub_id is None or spec.network is None:
        raise UserError(
            f"The variant {spec.name} has no official checkpoint, which would give its size; give "
            "pretrained_model_name_or_path=FOLDER, or model_name="
            f"{' or '.join(name for name, each in VARIANTS.items() if each.hub_id)}."
        )
    transformer = DiTConfig.from_json({**spec.network, "_class_name": spec.task.transformer_class})
    nets = {
        "text_encoder": XXL,
        "image_encoder": VIT_H_14,
        "audio_encoder": XLSR_53,
        "transformer": transformer,
        "transformer_2": transformer,
        "vae": WAN21 if transformer.out_channels == WAN21.z_dim else WAN22,
    }
    return {name: nets[name] for name in spec.nets}
