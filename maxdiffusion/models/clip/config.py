"""Dimensions of a CLIP vision tower, from the checkpoint's image_encoder/config.json. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.models import checkpoint_config


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Field names and defaults are those of `transformers.CLIPVisionConfig`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int = 224
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size or self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"The image encoder's image_size {self.image_size} must divide by its patch_size {self.patch_size} and "
                f"its hidden_size {self.hidden_size} by its {self.num_attention_heads} heads."
            )

    @property
    def tokens(self) -> int:
        """Hidden states of an image: one for the class, then one for each patch."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> CLIPVisionConfig:
        """Parses image_encoder/config.json; keys that do not change the tower are ignored.

        Raises:
          UserError: a missing, unsupported or mistyped key.
        """
        only: dict[str, tuple[Any, ...]] = {
            "model_type": ("clip_vision_model",),
            "hidden_act": ("gelu",),  # ViT-H/14's; OpenAI's own towers have quick_gelu
            "num_channels": (3,),
        }
        return checkpoint_config.parse(cls, raw, net="image encoder", only=only, ignore_unknown=True)


VIT_H_14 = CLIPVisionConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
)
