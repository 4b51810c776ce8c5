"""The Animate transformer against `diffusers.WanAnimateTransformer3DModel` on the same random weights."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanAnimateTransformer3DModel
from flax import nnx

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.models.dit.animate import Performance
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.context import Context
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.weights.tables import dit as table
from tests.support.animate import TINY
from tests.support.parity import load_state_dict, relative_error

SIZE = (3, 6, 4)  # the character's own frame, then 5 frames


@functools.cache
def reference_model():
    torch.manual_seed(0)
    model = WanAnimateTransformer3DModel(**TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def ours():
    config = DiTConfig.from_json(dict(reference_model().config) | {"_class_name": "WanAnimateTransformer3DModel"})
    model = WanTransformer(config, AttentionPlan(), Dtypes())
    return load_state_dict(model, table.RULES, reference_model().state_dict())


def faces():
    return np.random.default_rng(2).uniform(-1, 1, (2, 5, 32, 32, 3)).astype(np.float32)


def test_the_motion_encoder_matches_the_reference():
    with torch.no_grad():
        theirs = reference_model().motion_encoder(torch.from_numpy(faces().reshape(-1, 32, 32, 3)).permute(0, 3, 1, 2))
    motion = nnx.jit(lambda encoder, faces: encoder(faces))(ours().adapter.motion_encoder, jnp.asarray(faces()))
    assert relative_error(motion.reshape(theirs.shape), theirs) < 1e-4


def test_the_face_encoder_matches_the_reference():
    motion = np.random.default_rng(3).standard_normal((2, 9, 14), dtype=np.float32)
    with torch.no_grad():
        theirs = reference_model().face_encoder(torch.from_numpy(motion))
    assert relative_error(ours().adapter.face_encoder(jnp.asarray(motion)), theirs) < 1e-5


def test_the_transformer_matches_the_reference():
    rng = np.random.default_rng(1)
    latents, pose = (rng.standard_normal((2, *size), dtype=np.float32) for size in ((*SIZE, 12), (2, *SIZE[1:], 4)))
    context = rng.standard_normal((2, 7, 20), dtype=np.float32)
    timestep = np.array([999.0, 37.5], np.float32)
    with torch.no_grad():
        theirs = reference_model()(
            torch.from_numpy(latents).permute(0, 4, 1, 2, 3),
            torch.from_numpy(timestep),
            torch.from_numpy(context),
            pose_hidden_states=torch.from_numpy(pose).permute(0, 4, 1, 2, 3),
            face_pixel_values=torch.from_numpy(faces()).permute(0, 4, 1, 2, 3),
            return_dict=False,
        )[0]

    @nnx.jit
    def run(model, latents, timestep, context, performance):
        return model(latents, timestep, model.prepare(Context(context, adapter=performance)))

    performance = Performance(jnp.asarray(pose), jnp.asarray(faces()))
    velocity = run(ours(), jnp.asarray(latents), jnp.asarray(timestep), jnp.asarray(context), performance)
    assert relative_error(velocity, theirs.permute(0, 2, 3, 4, 1)) < 1e-4


@pytest.mark.parametrize("change", [{"motion_encoder_size": 48}, {"motion_encoder_channel_sizes": {"4": 8}}])
def test_sizes_without_channels_are_refused(change):
    config = {**TINY, "_class_name": "WanAnimateTransformer3DModel", **change}
    with pytest.raises(UserError, match="power of two"):
        DiTConfig.from_json(config).adapter.channels()
