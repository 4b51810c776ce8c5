"""The VAE against diffusers' AutoencoderKLWan on the same random weights."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx

from maxdiffusion.models.vae import VAEConfig, WanVAE
from maxdiffusion.weights.tables.vae import RULES

TINY = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [0.9, 1.1, 1.3, 0.7],
}


def reference(seed: int = 0, **overrides) -> AutoencoderKLWan:
    """Random weights with every norm gain and bias away from its trivial value."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**(TINY | overrides)).eval()
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if name.endswith("gamma"):
                p.add_(0.2 * torch.randn_like(p))
            elif name.endswith("bias"):
                p.add_(0.1 * torch.randn_like(p))
    return vae


def load(vae: AutoencoderKLWan, **kwargs) -> WanVAE:
    config = VAEConfig.from_json(dict(vae.config))
    with nnx.use_eager_sharding(False):
        abstract = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0), **kwargs))
    graph, state = nnx.split(abstract)
    leaves = {".".join(map(str, path)): v for path, v in nnx.to_flat_state(state)}
    filled = set()
    for name, tensor in vae.state_dict().items():
        for rule in RULES:
            pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[0-9]+)", re.escape(rule.source))
            if m := re.fullmatch(pattern, name):
                target = rule.target.format(**m.groupdict())
                value = tensor.numpy()
                if rule.transform.value:
                    value = value.transpose(rule.transform.value)
                leaf = leaves[target]
                leaf.set_value(jnp.asarray(value.reshape(leaf.shape), leaf.dtype))
                filled.add(target)
                break
        else:
            raise AssertionError(name)
    assert filled == leaves.keys()
    return nnx.merge(graph, state)


@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_parity(frames):
    vae = reference()
    model = load(vae)
    rng = np.random.default_rng(1)
    z = rng.standard_normal((2, (frames - 1) // 4 + 1, 3, 5, 4), np.float32)
    c = vae.config
    zt = torch.from_numpy(z * np.float32(c.latents_std) + np.float32(c.latents_mean)).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        want = vae.decode(zt).sample.permute(0, 2, 3, 4, 1).numpy()
    for chunk in (None, 1, 2):
        got = np.asarray(model.decode(jnp.asarray(z), chunk=chunk))
        print(chunk, np.abs(got - want).max() / np.abs(want).max())
    x = rng.uniform(-1, 1, (1, frames, 24, 40, 3)).astype(np.float32)
    with torch.no_grad():
        want = vae.encode(torch.from_numpy(x).permute(0, 4, 1, 2, 3)).latent_dist.mode().permute(0, 2, 3, 4, 1).numpy()
    want = (want - np.float32(c.latents_mean)) / np.float32(c.latents_std)
    for chunk in (None, 1, 2):
        got = np.asarray(model.encode(jnp.asarray(x), chunk=chunk))
        print(chunk, np.abs(got - want).max() / np.abs(want).max())
