"""The VACE transformer against `diffusers.WanVACETransformer3DModel` on the same random weights."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanVACETransformer3DModel
from flax import nnx

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.context import Context
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.dit.vace import Control
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.weights.tables import dit as table
from tests.support.parity import load_state_dict, relative_error

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 40,
    "num_layers": 5,
    "vace_layers": [0, 1, 3],  # unevenly spaced, a plain block at the end
    "vace_in_channels": 10,
}
SIZE = (3, 6, 4)


@functools.cache
def reference_model():
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(**TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_matches_the_reference(scan_layers):
    rng = np.random.default_rng(1)
    latents, control = (rng.standard_normal((2, *SIZE, c), dtype=np.float32) for c in (4, 10))
    context = rng.standard_normal((2, 7, 20), dtype=np.float32)
    timestep, scale = np.array([999.0, 37.5], np.float32), np.array([0.5, 1.0, 1.5], np.float32)
    with torch.no_grad():
        theirs = reference_model()(
            torch.from_numpy(latents).permute(0, 4, 1, 2, 3),
            torch.from_numpy(timestep),
            torch.from_numpy(context),
            control_hidden_states=torch.from_numpy(control).permute(0, 4, 1, 2, 3),
            control_hidden_states_scale=torch.from_numpy(scale),
            return_dict=False,
        )[0]
    config = DiTConfig.from_json(dict(reference_model().config) | {"_class_name": "WanVACETransformer3DModel"})
    model = WanTransformer(config, AttentionPlan(), Dtypes(), scan_layers=scan_layers)
    load_state_dict(model, table.RULES, reference_model().state_dict())

    @nnx.jit
    def run(model, latents, timestep, context, control):
        return model(latents, timestep, model.prepare(Context(context, adapter=control)))

    given = Control(jnp.asarray(control), jnp.broadcast_to(jnp.asarray(scale), (2, 3)))
    ours = run(model, jnp.asarray(latents), jnp.asarray(timestep), jnp.asarray(context), given)
    assert relative_error(ours, theirs.permute(0, 2, 3, 4, 1)) < 1e-5


@pytest.mark.parametrize("layers", [[1, 2], [0, 5], [0, 3, 1], [0, 0], []])
def test_layers_that_do_not_rise_from_0_are_refused(layers):
    config = {**TINY, "_class_name": "WanVACETransformer3DModel", "vace_layers": layers}
    with pytest.raises(UserError, match="must rise from 0"):
        DiTConfig.from_json(config)
