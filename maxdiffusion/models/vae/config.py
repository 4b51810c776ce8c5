"""Dimensions of the VAE, from the checkpoint's vae/config.json. Imports no jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.models import checkpoint_config

# Keys that follow from others.
_DERIVED = {
    "scale_factor_temporal": "temporal_factor",
    "scale_factor_spatial": "spatial_factor",
    "in_channels": "channels",
    "out_channels": "channels",
}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Dimensions of the autoencoder (field names as in diffusers' AutoencoderKLWan, its spelling included).

    The encoder halves height and width between every two entries of `dim_mult`, and the frame rate where
    `temperal_downsample` says so; the decoder mirrors it. The VAE of WAN 2.2 folds patches of pixels into channels
    first (`patch_size`), and has shortcuts around whole levels (`is_residual`).
    """

    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    is_residual: bool = False
    patch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise UserError(
                    f"The VAE's config gives {len(getattr(self, name))} values of {name} for z_dim={self.z_dim}; "
                    f"it needs {self.z_dim}, one for each latent channel."
                )
        if min(self.latents_std) <= 0:
            raise UserError(f"The VAE's config gives latents_std={self.latents_std}; each value must be positive.")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise UserError(
                f"The VAE's config gives temperal_downsample={self.temperal_downsample} for dim_mult={self.dim_mult}; "
                f"it needs {len(self.dim_mult) - 1} entries, one between every two multipliers."
            )

    @property
    def temporal_factor(self) -> int:
        """Frames for each latent frame after the first."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def spatial_factor(self) -> int:
        """Pixels for each latent pixel, along height and along width."""
        return 2 ** (len(self.dim_mult) - 1) * self.patch

    @property
    def patch(self) -> int:
        """Side of the pixel patches that are folded into channels."""
        return self.patch_size or 1

    @property
    def channels(self) -> int:
        """Input channels of the first convolution and output channels of the last."""
        return 3 * self.patch**2

    @property
    def decoder_dim(self) -> int:
        return self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> VAEConfig:
        """Parses the dictionary of a diffusers `vae/config.json`.

        Raises:
          UserError: a missing, unsupported or mistyped key, or values that contradict each other.
        """
        only: dict[str, tuple[Any, ...]] = {"attn_scales": ([], ()), "dropout": (0.0,)}
        parsed = checkpoint_config.parse(
            cls, {key: value for key, value in config.items() if key not in _DERIVED}, net="VAE", only=only
        )
        for key, derived in _DERIVED.items():
            if config.get(key) not in (None, getattr(parsed, derived)):
                raise UserError(
                    f"The VAE's config gives {key}={config[key]}, but its other dimensions make it "
                    f"{getattr(parsed, derived)}; correct one of them."
                )
        return parsed


# The official dimensions, with placeholders for the latents' means and deviations, which do not affect shapes.
WAN21 = VAEConfig((0.0,) * 16, (1.0,) * 16)
WAN22 = VAEConfig(
    (0.0,) * 48, (1.0,) * 48, z_dim=48, base_dim=160, decoder_base_dim=256, is_residual=True, patch_size=2
)
