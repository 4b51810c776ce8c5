"""The S2V transformer against `WanModel_S2V` of the official repository on the same random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from maxdiffusion import parallel
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.context import Context
from maxdiffusion.models.dit.s2v import Speech
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.weights import dimensions
from maxdiffusion.weights.tables import dit as table
from tests.support import official_s2v
from tests.support.official import channels_last
from tests.support.parity import by_table, load_state_dict, relative_error

SIZE, MOTION, LAYERS = (3, 16, 24), 19, 25  # latent frames, height, width


@functools.cache
def reference_model():
    return official_s2v.transformer()


@functools.cache
def tensors():
    """The tensors of the official file by the names of the table."""
    return by_table(reference_model())


def config(**changes):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    base = {"attention_head_dim": official_s2v.HEAD_DIM, **official_s2v.CONFIG, **changes}
    return DiTConfig.from_json(dimensions.transformer_config(shapes, base, "the file"))


@functools.cache
def ours():
    model = WanTransformer(config(), AttentionPlan(), Dtypes())
    return load_state_dict(model, table.RULES, tensors())


def test_the_audio_encoder_matches_the_reference():
    audio = np.random.default_rng(0).standard_normal((2, LAYERS, 13, official_s2v.AUDIO), dtype=np.float32)
    with torch.no_grad():
        whole, local = reference_model().casual_audio_encoder(torch.from_numpy(audio).transpose(2, 3))
    mine = nnx.jit(lambda encoder, audio: encoder(audio))(ours().adapter.audio_encoder, jnp.asarray(audio))
    assert relative_error(mine[0], whole[:, :, 0]) < 1e-4
    assert relative_error(mine[1], local) < 1e-4


@functools.cache
def inputs():
    """Latents, timesteps, text and `Speech` of two clips, of which the first goes on from another."""
    rng = np.random.default_rng(1)

    def drawn(*shape):
        return rng.standard_normal((2, *shape), dtype=np.float32)

    latents, pose, reference = drawn(*SIZE, 16), drawn(*SIZE, 16), drawn(1, *SIZE[1:], 16)
    motion, audio, text = drawn(MOTION, *SIZE[1:], 16), drawn(LAYERS, 4 * SIZE[0], official_s2v.AUDIO), drawn(7, 32)
    timestep, continued = np.array([999.0, 37.5], np.float32), np.array([1.0, 0.0], np.float32)
    return latents, timestep, text, Speech(audio, pose, reference, motion, continued)


def velocity(model):
    @nnx.jit
    def run(model, latents, timestep, text, speech):
        text = jnp.pad(text, ((0, 0), (0, 512 - text.shape[1]), (0, 0)))
        return model(latents, timestep, model.prepare(Context(text, adapter=speech)))

    return run(model, *jax.tree.map(jnp.asarray, inputs()))


def reference_velocity(row):
    """The official code makes one video at a time."""
    latents, timestep, text, speech = jax.tree.map(lambda x: torch.from_numpy(x[row : row + 1]), inputs())

    def video(x):
        return x[0].permute(3, 0, 1, 2)

    with torch.no_grad():
        [made] = reference_model()(
            [video(latents)],
            timestep,
            [text[0]],
            None,
            [video(speech.reference)],
            [video(speech.motion)],
            [video(speech.pose)],
            speech.audio.transpose(2, 3),
            motion_frames=[4 * MOTION - 3, MOTION],
            drop_motion_frames=not speech.continued,
        )
    return channels_last(made)


def test_the_transformer_matches_the_reference():
    mine = velocity(ours())
    for row in range(2):
        assert relative_error(mine[row], reference_velocity(row)) < 1e-4


def test_eight_devices_compute_the_same():
    # 8 divides the tokens of every size that S2V has, in multiples of 64 pixels.
    place = parallel.Placement(parallel.make_mesh(parallel.Degrees(context=8), ulysses=2), parallel.rules_for(()))
    plan = AttentionPlan.parse("ulysses_ring", heads=2, context=8, ulysses_shards=2, tensor=1)
    model = load_state_dict(WanTransformer(config(), plan, Dtypes()), table.RULES, tensors())
    with parallel.use(place):
        mine = velocity(model)
    assert relative_error(mine, velocity(ours())) < 1e-4


def test_tokens_are_counted_as_the_official_size_has_them():
    # 1024 x 704 pixels, 20 latent frames: video, reference, and the motion in three patch sizes.
    assert config().tokens(20, 88, 128) == 56320 + 2816 + 2816 + 704 + 704


@pytest.mark.parametrize("layers", [[1, 2], [0, 3], [0, 0]])
def test_layers_that_it_lacks_are_refused(layers):
    with pytest.raises(UserError, match="audio_inject_layers are"):
        config(audio_inject_layers=layers)
