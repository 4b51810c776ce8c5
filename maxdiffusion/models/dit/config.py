"""Dimensions of a WAN transformer, from the checkpoint's transformer/config.json. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from maxdiffusion.errors import UserError
from maxdiffusion.models import checkpoint_config


@dataclasses.dataclass(frozen=True)
class VACEConfig:
    """The fields that `diffusers.WanVACETransformer3DModel` adds."""

    vace_layers: tuple[int, ...]
    vace_in_channels: int


@dataclasses.dataclass(frozen=True)
class AnimateConfig:
    """The fields that `diffusers.WanAnimateTransformer3DModel` adds."""

    latent_channels: int
    motion_encoder_channel_sizes: tuple[tuple[str, int], ...] | None = None  # (size, channels); None: as published
    motion_encoder_size: int = 512
    motion_style_dim: int = 512
    motion_dim: int = 20
    motion_encoder_dim: int = 512
    face_encoder_hidden_dim: int = 1024
    face_encoder_num_heads: int = 4
    inject_face_latents_blocks: int = 5
    motion_encoder_batch_size: int = 8

    MOTION_LAYERS: ClassVar[int] = 5  # linear ones, from the style to the motion
    CHANNELS: ClassVar[tuple[tuple[str, int], ...]] = tuple((str(2**n), min(512, 2 ** (14 - n))) for n in range(2, 11))

    def channels(self) -> tuple[int, ...]:
        """Channels of the motion encoder at each size, halved from the faces' own to 4.

        Raises:
          UserError: the size is not a power of two, or has no channels.
        """
        sizes = [2**n for n in reversed(range(2, self.motion_encoder_size.bit_length()))]
        table = dict(self.motion_encoder_channel_sizes or self.CHANNELS)
        if sizes[:1] != [self.motion_encoder_size] or any(str(size) not in table for size in sizes):
            raise UserError(
                f"The transformer's motion_encoder_size is {self.motion_encoder_size}; it must be a power of two, and "
                f"motion_encoder_channel_sizes must name all from 4 up to it, not {', '.join(table)}."
            )
        return tuple(table[str(size)] for size in sizes)


@dataclasses.dataclass(frozen=True)
class S2VConfig:
    """The fields that `WanModel_S2V` of the official repository adds; `audio_layers` is the length of its `weights`."""

    audio_dim: int
    audio_layers: int = 25
    num_audio_token: int = 4
    audio_inject_layers: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
    cond_dim: int = 16

    BUCKETS: ClassVar[tuple[int, ...]] = (1, 2, 16)  # latent frames that FramePack reads, nearest first
    MOTION: ClassVar[int] = sum(BUCKETS)

    def tokens(self, height: int, width: int) -> int:
        """Tokens beside those of the video: of the reference, and of the frames before the clip.

        The sizes are those of one frame's grid.
        """
        packed = (frames // 2**i * (height // 2**i) * (width // 2**i) for i, frames in enumerate(self.BUCKETS))
        return height * width + sum(packed)


@dataclasses.dataclass(frozen=True)
class Animate2Config:
    """What `diffusers.WanAnimate2Transformer3DModel` adds, which has no weights of its own.

    Attributes:
      log_scale: added to the logits of the first generated frame's keys; the distilled checkpoint has -1.3.
    """

    log_scale: float = 0.0

    SKIPPED: ClassVar[int] = 9  # the layer that the negative branch of guidance leaves out

    @staticmethod
    def origin(grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Position of the first token of a driving video: its frames are those of the result, and right of it."""
        return 1, 0, grid[2]


AdapterConfig = VACEConfig | AnimateConfig | Animate2Config | S2VConfig

_ADAPTERS: Mapping[str, type[AdapterConfig]] = {
    "WanVACETransformer3DModel": VACEConfig,
    "WanAnimateTransformer3DModel": AnimateConfig,
    "WanAnimate2Transformer3DModel": Animate2Config,
    "WanS2VTransformer3DModel": S2VConfig,
}


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
    image_dim: int | None = None  # of the image encoder's hidden states; None: no cross-attention to an image
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None  # image tokens that have a position embedding: those of two images
    adapter: AdapterConfig | None = None

    def __post_init__(self) -> None:
        if self.added_kv_proj_dim not in (None, self.dim) or (self.added_kv_proj_dim is None) != (
            self.image_dim is None
        ):
            raise UserError(
                f"The transformer's added_kv_proj_dim is {self.added_kv_proj_dim}; with image_dim={self.image_dim} it "
                f"must be {None if self.image_dim is None else self.dim}."
            )
        if self.attention_head_dim % 2 or self.attention_head_dim < 12:
            raise UserError(
                f"The transformer's attention_head_dim is {self.attention_head_dim}; rotary positions on three axes "
                "need an even number from 12 on."
            )
        name = "audio_inject_layers" if isinstance(self.adapter, S2VConfig) else "vace_layers"
        layers = getattr(self.adapter, name, (0,))
        if layers[:1] != (0,) or list(layers) != sorted({*layers} & {*range(self.num_layers)}):
            raise UserError(
                f"The transformer's {name} are {list(layers)}; they must rise from 0 to less than "
                f"num_layers={self.num_layers}."
            )

    @property
    def adapter_layers(self) -> tuple[int, ...]:
        """The layers after which the adapter acts."""
        match self.adapter:
            case VACEConfig(vace_layers=layers):
                return layers
            case AnimateConfig(inject_face_latents_blocks=every):
                return tuple(range(0, self.num_layers, every))
            case S2VConfig(audio_inject_layers=layers):
                return layers
            case Animate2Config() | None:
                return ()

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

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of a latent of the given size, with those that the adapter appends.

        Raises:
          UserError: as `grid`.
        """
        grid = self.grid(frames, height, width)
        appended = self.adapter.tokens(*grid[1:]) if isinstance(self.adapter, S2VConfig) else 0
        return math.prod(grid) + appended

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> DiTConfig:
        """Parses transformer/config.json.

        Raises:
          UserError: a missing, unsupported or mistyped key.
        """
        raw = dict(raw)
        if raw.get("out_channels") is None and "in_channels" in raw:  # the reference's reading of null
            raw["out_channels"] = raw["in_channels"]
        adapter: AdapterConfig | None = None
        if raw.get("_class_name") == "WanAnimate2Transformer3DModel":
            adapter = Animate2Config(float(raw.pop("log_scale", 0.0)))  # negative, which `parse` refuses
        elif (kind := _ADAPTERS.get(raw.get("_class_name", ""))) is not None:
            own = {field.name: raw.pop(field.name) for field in dataclasses.fields(kind) if field.name in raw}
            if isinstance(sizes := own.get("motion_encoder_channel_sizes"), dict):  # a network's config is hashable
                own["motion_encoder_channel_sizes"] = tuple(sizes.items())
            adapter = checkpoint_config.parse(kind, own, net="transformer", only={})
        only: dict[str, tuple[Any, ...]] = {
            "_class_name": ("WanTransformer3DModel", *_ADAPTERS),
            "qk_norm": ("rms_norm_across_heads",),
            "cross_attn_norm": (True,),
            "add_img_emb": (False,),
            "window_size": ([-1, -1], (-1, -1)),
        }
        return dataclasses.replace(checkpoint_config.parse(cls, raw, net="transformer", only=only), adapter=adapter)
