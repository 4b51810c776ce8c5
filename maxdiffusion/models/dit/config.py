"""Dimensions of a WAN transformer, from the checkpoint's transformer/config.json. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.models import checkpoint_config


@dataclasses.dataclass(frozen=True)
class VACEConfig:
    """What `diffusers.WanVACETransformer3DModel` adds."""

    vace_layers: tuple[int, ...]
    vace_in_channels: int


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Field names are those of `diffusers.WanTransformer3DModel`."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    vace: VACEConfig | None = None

    def __post_init__(self) -> None:
        if self.attention_head_dim % 2 or self.attention_head_dim < 12:
            raise UserError(
                f"The transformer's attention_head_dim is {self.attention_head_dim}; rotary positions on three axes "
                "need an even number from 12 on."
            )
        layers = self.vace.vace_layers if self.vace else (0,)
        if layers[:1] != (0,) or list(layers) != sorted({*layers} & {*range(self.num_layers)}):
            raise UserError(
                f"The transformer's vace_layers are {list(layers)}; they must rise from 0 to less than "
                f"num_layers={self.num_layers}."
            )

    @property
    def dim(self) -> int:
        """Model dim: heads x head dim."""
        return self.num_attention_heads * self.attention_head_dim

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens on each axis of a latent of the given size.

        Raises:
          UserError: the size does not divide by the patch or has more positions than the model has.
        """
        size = (frames, height, width)
        for name, extent, patch in zip(("frames", "height", "width"), size, self.patch_size, strict=True):
            if extent % patch:
                below = extent // patch * patch
                raise UserError(
                    f"A latent with {name} {extent} does not divide by the transformer's patch {patch}; "
                    f"the nearest are {below or patch} and {below + patch}."
                )
            if extent // patch > self.rope_max_seq_len:
                raise UserError(
                    f"A latent with {name} {extent} makes {extent // patch} positions; "
                    f"this transformer has {self.rope_max_seq_len}, so at most {self.rope_max_seq_len * patch}."
                )
        f, h, w = (extent // patch for extent, patch in zip(size, self.patch_size, strict=True))
        return f, h, w

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> DiTConfig:
        """Parses transformer/config.json.

        Raises:
          UserError: a missing, unsupported or mistyped key.
        """
        raw = dict(raw)
        if raw.get("out_channels") is None and "in_channels" in raw:  # the reference's reading of null
            raw["out_channels"] = raw["in_channels"]
        vace = None
        if raw.get("_class_name") == "WanVACETransformer3DModel":
            own = {name: raw.pop(name) for name in ("vace_layers", "vace_in_channels") if name in raw}
            vace = checkpoint_config.parse(VACEConfig, own, net="transformer", only={})
        only: dict[str, tuple[Any, ...]] = {
            "_class_name": ("WanTransformer3DModel", "WanVACETransformer3DModel"),
            "qk_norm": ("rms_norm_across_heads",),
            "cross_attn_norm": (True,),
            "image_dim": (None,),
            "added_kv_proj_dim": (None,),
            "pos_embed_seq_len": (None,),
            "add_img_emb": (False,),
            "window_size": ([-1, -1], (-1, -1)),
        }
        return dataclasses.replace(checkpoint_config.parse(cls, raw, net="transformer", only=only), vace=vace)
