"""The S2V transformer against `WanModel_S2V` of the official repository on the same random weights."""

import functools
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.context import Context
from maxdiffusion.models.dit.s2v import Speech
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.weights import dimensions, net_file
from maxdiffusion.weights.tables import dit as table
from tests.support import official_s2v
from tests.support.official import channels_last
from tests.support.parity import load_state_dict, relative_error

SIZE, MOTION, LAYERS = (3, 16, 24), 19, 25  # latent frames, height, width


@functools.cache
def reference_model():
    return official_s2v.transformer()


@functools.cache
def tensors():
    """The tensors of the official file by the names of the table."""
    stored = reference_model().state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        safetensors.torch.save_file(stored, path)
        found, _ = net_file.read(path, "transformer")
    return {name: stored[source.name] for name, source in found.items()}


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


def test_the_transformer_matches_the_reference():
    rng = np.random.default_rng(1)

    def drawn(*shape):
        return rng.standard_normal((2, *shape), dtype=np.float32)

    latents, pose, reference = drawn(*SIZE, 16), drawn(*SIZE, 16), drawn(1, *SIZE[1:], 16)
    motion, audio, text = drawn(MOTION, *SIZE[1:], 16), drawn(LAYERS, 4 * SIZE[0], official_s2v.AUDIO), drawn(7, 32)
    timestep, continued = np.array([999.0, 37.5], np.float32), np.array([1.0, 0.0], np.float32)

    def first(x):
        return torch.from_numpy(x).permute(3, 0, 1, 2)

    theirs = []
    for row in range(2):  # the official code makes one video at a time
        with torch.no_grad():
            [velocity] = reference_model()(
                [first(latents[row])],
                torch.from_numpy(timestep[row : row + 1]),
                [torch.from_numpy(text[row])],
                None,
                [first(reference[row])],
                [first(motion[row])],
                [first(pose[row])],
                torch.from_numpy(audio[row : row + 1]).transpose(2, 3),
                motion_frames=[4 * MOTION - 3, MOTION],
                drop_motion_frames=not continued[row],
            )
        theirs.append(channels_last(velocity))

    @nnx.jit
    def run(model, latents, timestep, text, speech):
        text = jnp.pad(text, ((0, 0), (0, 512 - text.shape[1]), (0, 0)))
        return model(latents, timestep, model.prepare(Context(text, adapter=speech)))

    speech = Speech(*map(jnp.asarray, (audio, pose, reference, motion, continued)))
    velocity = run(ours(), jnp.asarray(latents), jnp.asarray(timestep), jnp.asarray(text), speech)
    assert relative_error(velocity, np.stack(theirs)) < 1e-4
    assert relative_error(velocity[:1], theirs[0][None]) < 1e-4 and relative_error(velocity[1:], theirs[1][None]) < 1e-4


def test_tokens_are_counted_as_the_official_size_has_them():
    # 1024 x 704 pixels, 20 latent frames: video, reference, and the motion in three patch sizes.
    assert config().tokens(20, 88, 128) == 56320 + 2816 + 2816 + 704 + 704


@pytest.mark.parametrize("layers", [[1, 2], [0, 3], [0, 0]])
def test_layers_that_it_lacks_are_refused(layers):
    with pytest.raises(UserError, match="audio_inject_layers are"):
        config(audio_inject_layers=layers)
