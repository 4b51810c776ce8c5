"""A step cache around the trunk: a state for each branch of guidance and each expert, and no change of the loop."""

import collections
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxdiffusion import parallel
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.denoise import cache_schedules
from maxdiffusion.denoise.caches import FirstBlock, MagCache, SeaCache, Spectrum, TaylorSeer, filter_signal
from maxdiffusion.denoise.experts import ExpertSteps
from maxdiffusion.denoise.guidance import BatchedGuidance, TwoPassGuidance
from maxdiffusion.denoise.loop import Denoiser
from maxdiffusion.denoise.network import Network, split
from maxdiffusion.denoise.noise import noise
from maxdiffusion.denoise.solvers import SOLVERS
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.dit.context import Context, Contexts
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.layers import Dtypes
from tests.support.parity import drawn_on_devices

SOLVER = SOLVERS["unipc"]
CONTEXTS = Contexts(*jnp.asarray(np.random.default_rng(1).standard_normal((2, 2, 4)), jnp.float32))
# Three experts: of odd lengths, so that one starts where steps counted over the run would reuse; one without guidance.
EXPERTS = ExpertSteps(0, 3, "a", 3.0), ExpertSteps(3, 5, "b", 1.0), ExpertSteps(5, 8, "c", 2.0)
PARAMS = tuple(map(jnp.float32, (1.0, -0.5, 2.0)))
GUIDANCE = [TwoPassGuidance(), BatchedGuidance()]


class Reused(NamedTuple):
    count: Any
    residual: Any


@dataclasses.dataclass(frozen=True)
class EveryOther:
    """Every second step adds the trunk's residual of the step before."""

    def reads(self, step):
        return True

    def table(self, schedule):
        return ()

    def init(self, x, tokens):
        return Reused(jax.ShapeDtypeStruct((), jnp.int32), tokens)

    def __call__(self, row, call, state):
        compute = state.count % 2 == 0
        residual = jax.lax.cond(compute, lambda x: call.trunk(x) - x, lambda x: state.residual, call.tokens)
        return call.head(call.tokens + residual), Reused(state.count + 1, residual)


def network(seen):
    """In three parts; notes its trunk's calls by timestep."""

    def embed(params, x, timestep, context):
        return 2 * x.reshape(len(x), -1, 4), (timestep, x)

    def trunk(params, tokens, signal, context):
        rows = len(tokens)
        jax.debug.callback(lambda t: seen[float(t)].append(rows), signal[0][0])
        return tokens - jnp.tanh(params * tokens + context[:, None] + jnp.sin(signal[0] / 200)[:, None, None])

    def head(params, tokens, signal):
        return tokens.reshape(signal[1].shape) / 2

    return Network(embed, trunk, head)


def denoiser(seen, guidance, **kwargs):
    schedule = SOLVER.schedule(EXPERTS[-1].stop, 3.0)
    return Denoiser(network(seen), EXPERTS, schedule, SOLVER, guidance, **kwargs)


def run(program, x):
    state = program.init(x)
    for params, expert in zip(PARAMS, EXPERTS, strict=True):
        state = program.advance(params, CONTEXTS, state, expert)
    jax.effects_barrier()
    return np.asarray(state.x)


def plainly(x):
    """Written out: the residuals of each expert and branch in a dictionary."""
    net, schedule = network(collections.defaultdict(list)), SOLVER.schedule(EXPERTS[-1].stop, 3.0)
    table, state, residuals = SOLVER.table(schedule), SOLVER.init(x), {}
    for params, expert in zip(PARAMS, EXPERTS, strict=True):
        for i in range(expert.start, expert.stop):
            velocities = []
            for branch, context in enumerate(CONTEXTS):
                time = jnp.full((len(x),), schedule.timesteps[i])
                tokens, signal = net.embed(params, state.x, time, context)
                if (i - expert.start) % 2 == 0:
                    residuals[expert.net, branch] = net.trunk(params, tokens, signal, context) - tokens
                velocities.append(net.head(params, tokens + residuals[expert.net, branch], signal))
            c, u = velocities
            row = jax.tree.map(lambda a, i=i: np.float32(a[i]), table)
            state = SOLVER.step(state, row, u + expert.guidance_scale * (c - u))
    return np.asarray(state.x)


@pytest.mark.parametrize("scan", [None, 100])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_each_branch_and_expert_has_a_state_of_its_own(guidance, scan):
    x, seen = noise([1, 2], (2, 4, 4, 4)), collections.defaultdict(list)
    program = denoiser(seen, guidance, cache=EveryOther(), scan=scan).compile(PARAMS[0], x, CONTEXTS.positive)
    np.testing.assert_allclose(run(program, x), plainly(x), rtol=1e-5, atol=1e-5)
    pair = [2, 2] if guidance == TwoPassGuidance() else [4]
    want = dict(zip((0, 2, 3, 5, 7), (pair, pair, [2], pair, pair), strict=True))
    assert seen == {float(program.inputs.timestep[i]): calls for i, calls in want.items()}


def test_a_kept_state_goes_on_in_the_middle_of_an_experts_steps():
    x, kept = noise([1, 2], (2, 4, 4, 4)), {}
    net = denoiser(collections.defaultdict(list), TwoPassGuidance(), cache=EveryOther())
    program = net.compile(PARAMS[0], x, CONTEXTS.positive)

    def keep(i, n, state):
        kept[i] = jax.tree.map(np.array, state)

    done = program.advance(PARAMS[0], CONTEXTS, program.init(x), EXPERTS[0], on_step=keep)
    assert done.cache is None and [int(each.count) for each in kept[0].cache] == [1, 1]
    again = jax.tree.map(jnp.asarray, kept[0])
    again = program.advance(PARAMS[0], CONTEXTS, again, EXPERTS[0]._replace(start=1))
    np.testing.assert_array_equal(again.x, done.x)


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_a_row_of_a_batch_decides_for_itself(guidance):
    """Latents whose filtered change differs: each video is what it is alone."""
    x = noise([1, 2], (2, 4, 4, 4)) * jnp.array([1.0, 20.0])[:, None, None, None, None]
    cache = SeaCache((True,) + (False,) * (EXPERTS[-1].stop - 1), 0.4, 3)

    def latents(rows):
        contexts = Contexts(*(each[rows] for each in CONTEXTS))
        net = denoiser(collections.defaultdict(list), guidance, cache=cache)
        return net.run(PARAMS[0], x[rows], contexts)

    alone = np.concatenate([latents(slice(row, row + 1)) for row in (0, 1)])
    np.testing.assert_allclose(latents(slice(0, 2)), alone, rtol=1e-5, atol=1e-5)


def test_spectrum_is_the_ridge_regression_of_its_authors():
    """Written out: h* = T(tau) (X'X + 0.1 I)^-1 X'H of all features since the expert's first step, in float64."""
    x, schedule = noise([1], (2, 4, 4, 4)), SOLVER.schedule(20, 3.0)
    experts = ExpertSteps(0, 11, "a", 3.0), ExpertSteps(11, 20, "b", 1.0)
    compute = cache_schedules.spectrum(experts, 3)
    assert sum(compute) < 14

    def basis(i):
        return np.polynomial.chebyshev.chebvander(2 * i / 50 - 1, 4).reshape(-1)

    net, table, state = network(collections.defaultdict(list)), SOLVER.table(schedule), SOLVER.init(x)
    for params, expert in zip(PARAMS, experts, strict=False):
        seen = {branch: ([], []) for branch in (0, 1)}
        for i in range(expert.start, expert.stop):
            velocities = []
            for branch, context in enumerate(CONTEXTS):
                tokens, signal = net.embed(params, state.x, jnp.full((1,), schedule.timesteps[i]), context[:1])
                at, features = seen[branch]
                if compute[i]:
                    out = net.trunk(params, tokens, signal, context[:1])
                    at.append(basis(i - expert.start))
                    features.append(np.asarray(out, np.float64).ravel())
                else:
                    big = np.array(at)
                    coef = np.linalg.solve(big.T @ big + 0.1 * np.eye(5), big.T @ np.array(features))
                    out = jnp.asarray((basis(i - expert.start) @ coef).reshape(tokens.shape), jnp.float32)
                velocities.append(net.head(params, out, signal))
            c, u = velocities
            row = jax.tree.map(lambda a, i=i: np.float32(a[i]), table)
            state = SOLVER.step(state, row, u + expert.guidance_scale * (c - u))

    cache = Spectrum(compute, tuple(each.start for each in experts))
    loop = Denoiser(net, experts, schedule, SOLVER, TwoPassGuidance(), cache)
    contexts = Contexts(*(each[:1] for each in CONTEXTS))
    program = loop.compile(PARAMS[0], x, contexts.positive)
    found = program.init(x)
    for params, expert in zip(PARAMS, experts, strict=False):
        found = program.advance(params, contexts, found, expert)
    np.testing.assert_allclose(found.x, state.x, rtol=1e-5, atol=1e-5 * np.abs(state.x).max())


CACHES = [
    EveryOther(),
    MagCache((True, True, False, True)),
    TaylorSeer((True, True, False, True)),
    FirstBlock((True, False, False, False), 0.3),
    SeaCache((True, True, False, False), 100.0, 2),
    Spectrum((True, True, False, True), (0,)),
]


@pytest.mark.parametrize(("scan", "cache"), [(100, CACHES[0]), *((None, cache) for cache in CACHES)])
def test_a_transformer_on_a_mesh_equals_one_device(scan, cache):
    """Tokens that the cache keeps are sharded as those that the trunk takes: 18, padded to 20 on a context of 4."""
    config = DiTConfig(2, 2, 12, 40, 4, 4, text_dim=20, freq_dim=32)
    x, text = noise([1, 2], (3, 6, 4, 4)), np.random.default_rng(0).standard_normal((2, 2, 7, 20)).astype(np.float32)
    schedule = SOLVER.schedule(4, 3.0)

    def latents(plan):
        model = drawn_on_devices(WanTransformer(config, plan, Dtypes()))
        net, params = split(model)
        batch = parallel.like((2,), np.float32, parallel.axes.BATCH).sharding
        contexts = Contexts(*(nnx.jit(WanTransformer.prepare)(model, Context(jnp.asarray(each))) for each in text))
        contexts, start = (contexts, x) if batch is None else jax.device_put((contexts, x), batch)
        experts = (ExpertSteps(0, 4, guidance_scale=3.0),)
        run = Denoiser(net, experts, schedule, SOLVER, BatchedGuidance(), cache, scan)
        return run.run(params, start, contexts)

    expected = latents(AttentionPlan())
    mesh = parallel.make_mesh(parallel.Degrees(data=2, context=4), ulysses=2)
    with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
        found = latents(AttentionPlan("ulysses_ring", "dot_product", ring=2, ulysses=2))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.0])
def test_the_filter_is_that_of_its_fourier_transform(sigma):
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 5, 2))
    noise = np.clip(sigma, 1e-6, 1 - 1e-6)
    gain = np.ones((1, 1, 1))
    for axis, size in enumerate(x.shape[1:4]):
        power = 1 / (np.abs(np.fft.fftfreq(size)) ** 3 + 1e-16)
        one = (1 - noise) * power / ((1 - noise) ** 2 * power + noise**2 + 1e-16)
        gain = gain * np.expand_dims(one, [other for other in range(3) if other != axis])
    gain = gain / gain.mean()
    want = np.fft.ifftn(np.fft.fftn(x, axes=(1, 2, 3)) * gain[..., None], axes=(1, 2, 3)).real
    found = filter_signal(jnp.asarray(x, jnp.float32), np.float32(sigma))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
