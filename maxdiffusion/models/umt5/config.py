"""Dimensions of a UMT5 encoder, from the checkpoint's text_encoder/config.json. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.models import checkpoint_config


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Field names are those of `transformers.UMT5Config`."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets % 4 or distance <= buckets // 4:
            raise UserError(
                f"The text encoder has {buckets} relative position buckets up to distance {distance}; "
                "the buckets must divide by 4 and the distance exceed a quarter of them."
            )

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> UMT5Config:
        """Parses text_encoder/config.json; keys that do not change the encoder are ignored.

        Raises:
          UserError: a missing, unsupported or mistyped key.
        """
        only: dict[str, tuple[Any, ...]] = {
            "model_type": ("umt5",),
            "feed_forward_proj": ("gated-gelu",),
            "dense_act_fn": ("gelu_new",),
            "is_gated_act": (True,),
            "is_decoder": (False,),
        }
        return checkpoint_config.parse(cls, raw, net="text encoder", only=only, ignore_unknown=True)


XXL = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
