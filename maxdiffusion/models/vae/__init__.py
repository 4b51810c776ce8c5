"""The WAN 2.1 VAE: a causal 3-D convolutional autoencoder that runs chunk by chunk.

`VAEConfig` needs no jax; the network is imported on first use, so that a config can be checked before jax loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maxdiffusion.models.vae.config import VAEConfig

if TYPE_CHECKING:
    from maxdiffusion.models.vae.model import WanVAE

__all__ = ["VAEConfig", "WanVAE"]


def __getattr__(name: str) -> Any:
    if name == "WanVAE":
        from maxdiffusion.models.vae.model import WanVAE

        return WanVAE
    raise AttributeError(name)
