"""diffusers' AutoencoderKLWan with random weights, and ours with the same."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from maxdiffusion.models.vae.config import VAEConfig
from maxdiffusion.models.vae.model import WanVAE
from maxdiffusion.weights.tables.vae import RULES
from tests.support.parity import load_state_dict

TINY = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [0.9, 1.1, 1.3, 0.7],
}


class Pair:
    """The reference with random weights, no gain or bias at its trivial value, and ours; both channels last."""

    def __init__(self, **overrides):
        torch.manual_seed(0)
        self.torch = AutoencoderKLWan(**(TINY | overrides)).eval()
        with torch.no_grad():
            for name, p in self.torch.named_parameters():
                if p.ndim == 1 or name.endswith("gamma"):
                    p.add_(0.2 * torch.randn_like(p))
        self.config = VAEConfig.from_json(dict(self.torch.config))
        self.mean, self.std = np.float32(self.config.latents_mean), np.float32(self.config.latents_std)
        self.ours = self.load()

    def load(self, **kwargs) -> WanVAE:
        return load_state_dict(WanVAE(self.config, **kwargs), RULES, self.torch.state_dict())

    @torch.no_grad()
    def decode(self, latents: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(latents * self.std + self.mean).permute(0, 4, 1, 2, 3)
        return self.torch.decode(z).sample.permute(0, 2, 3, 4, 1).numpy()

    @torch.no_grad()
    def encode(self, video: np.ndarray) -> np.ndarray:
        moments = self.torch.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist
        return (moments.mode().permute(0, 2, 3, 4, 1).numpy() - self.mean) / self.std
