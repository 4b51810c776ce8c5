"""Dimensions of a wav2vec 2.0 encoder, from the checkpoint's audio_encoder/config.json. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.models import checkpoint_config

SAMPLE_RATE = 16000


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
    """Field names and defaults are those of `transformers.Wav2Vec2Config`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    conv_dim: tuple[int, ...] = (512,) * 7
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride) > 0:
            raise UserError(
                f"The audio encoder's conv_dim, conv_kernel and conv_stride name {len(self.conv_dim)}, "
                f"{len(self.conv_kernel)} and {len(self.conv_stride)} layers; they must name as many."
            )
        for what, parts in (("heads", self.num_attention_heads), ("groups", self.num_conv_pos_embedding_groups)):
            if self.hidden_size % parts:
                raise UserError(
                    f"The audio encoder's hidden_size {self.hidden_size} must divide by its {parts} {what}."
                )

    @property
    def hidden_states(self) -> int:
        """The input of each layer, and the output of the last."""
        return self.num_hidden_layers + 1

    @property
    def stride(self) -> int:
        """Samples from one hidden state to the next."""
        return math.prod(self.conv_stride)

    @property
    def rate(self) -> float:
        """Hidden states per second, 50 as published."""
        return SAMPLE_RATE / self.stride

    def length(self, samples: int) -> int:
        """Hidden states of a sound of that many samples; 0 where it is too short for one."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            samples = max((samples - kernel) // stride + 1, 0)
        return samples

    def samples(self, states: int) -> int:
        """The least samples of which that many hidden states are made; the inverse of `length`."""
        for kernel, stride in zip(reversed(self.conv_kernel), reversed(self.conv_stride), strict=True):
            states = (states - 1) * stride + kernel
        return states

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Wav2Vec2Config:
        """Parses audio_encoder/config.json; keys that do not change the hidden states are ignored.

        Raises:
          UserError: a missing, unsupported or mistyped key.
        """
        only: dict[str, tuple[Any, ...]] = {
            "model_type": ("wav2vec2",),
            "hidden_act": ("gelu",),
            "feat_extract_activation": ("gelu",),
            "feat_extract_norm": ("layer",),  # the base models have "group"
            "do_stable_layer_norm": (True,),
            "conv_bias": (True,),
            "add_adapter": (False,),
        }
        return checkpoint_config.parse(cls, raw, net="audio encoder", only=only, ignore_unknown=True)


XLSR_53 = Wav2Vec2Config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
