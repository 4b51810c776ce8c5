"""The Animate 2 transformer against `diffusers.WanAnimate2Transformer3DModel` on the same random weights."""

import dataclasses
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
from maxdiffusion.models.dit.animate2 import Driving, DrivingVideo
from maxdiffusion.models.dit.config import Animate2Config, DiTConfig
from maxdiffusion.models.dit.context import Context, Frames, Shared, map_batched
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.weights import dimensions
from maxdiffusion.weights.tables import dit as table
from tests.support import animate2
from tests.support.official import channels_last
from tests.support.parity import by_table, load_state_dict, relative_error

SIZE = (4, 6, 10)  # latent frames with the character's own; 15 tokens a frame, 60 in all, 45 of the driving video


@functools.cache
def reference_model():
    return animate2.transformer()


@functools.cache
def tensors():
    """The tensors of the reference's file by the names of the table."""
    return by_table(reference_model())


def config(**changes):
    stored = {"_class_name": "WanAnimate2Transformer3DModel", **reference_model().config, **changes}
    return DiTConfig.from_json(dimensions.renamed(stored))


def ours(plan=None, log_scale=0.0):
    distilled = dataclasses.replace(config(), adapter=Animate2Config(log_scale))
    return load_state_dict(WanTransformer(distilled, plan or AttentionPlan(), Dtypes()), table.RULES, tensors())


@functools.cache
def inputs():
    """Latents, timesteps and a context of two examples, of which the second is the negative branch of guidance."""
    rng = np.random.default_rng(1)

    def drawn(*shape):
        return rng.standard_normal((2, *shape), dtype=np.float32)

    video = DrivingVideo(drawn(SIZE[0] - 1, *SIZE[1:], 16)[0], drawn(512, 32)[0], drawn(5, 1280)[0])
    driving = Driving(Shared(video), np.array([False, True]))
    context = Context(drawn(512, 32), drawn(5, 1280), Frames(drawn(*SIZE, 20)), driving)
    return drawn(*SIZE, 16), np.array([999.0, 37.5], np.float32), context


def velocity(model):
    run = nnx.jit(lambda model, latents, timestep, context: model(latents, timestep, model.prepare(context)))
    return run(model, *jax.tree.map(jnp.asarray, inputs()))


def reference_velocity(row):
    latents, timestep, context = map_batched(lambda x: torch.tensor(x[row]), inputs())
    acted = jax.tree.map(torch.tensor, context.adapter.video.value)

    def video(x):
        return x.permute(3, 0, 1, 2)

    made = animate2.velocity(
        reference_model(),
        video(latents),
        timestep[None],
        video(context.frames.channels),
        context.text,
        context.image,
        (video(acted.latents), acted.text, acted.image),
        bool(context.adapter.negative),
    )
    return channels_last(made)


def test_both_passes_match_the_reference():
    mine = velocity(ours())
    for row in range(2):
        assert relative_error(mine[row], reference_velocity(row)) < 1e-4


@pytest.mark.parametrize(
    ("ulysses", "log_scale"),
    [(2, -1.3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0.0), (1, -1.3), (2, 0.0)))],
)
def test_eight_devices_compute_the_same(ulysses, log_scale):
    # Neither 60 nor 45 tokens divide by 8, and no frame's tokens are those of one device.
    place = parallel.Placement(parallel.make_mesh(parallel.Degrees(context=8), ulysses=ulysses), parallel.rules_for(()))
    plan = AttentionPlan.parse("ulysses_ring", heads=2, context=8, ulysses_shards=ulysses, tensor=1)
    alone = velocity(ours(log_scale=log_scale))
    with parallel.use(place):
        together = velocity(ours(plan, log_scale))
    assert relative_error(together, alone) < 1e-4


def test_another_arrangement_of_positions_is_refused():
    with pytest.raises(UserError, match="refer_stride=2; supported is 1"):
        config(refer_stride=2)
