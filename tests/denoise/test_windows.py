"""Denoise steps over context windows: their arithmetic, against a run written out, and over a mesh."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxdiffusion import parallel
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.denoise.blending import blend
from maxdiffusion.denoise.experts import expert_steps
from maxdiffusion.denoise.guidance import BatchedGuidance, TwoPassGuidance
from maxdiffusion.denoise.loop import Denoiser
from maxdiffusion.denoise.network import Network, split
from maxdiffusion.denoise.noise import noise
from maxdiffusion.denoise.solvers import SOLVERS
from maxdiffusion.denoise.windows import Windows
from maxdiffusion.models.dit.config import DiTConfig, VACEConfig
from maxdiffusion.models.dit.context import Context, Contexts
from maxdiffusion.models.dit.transformer import WanTransformer
from maxdiffusion.models.dit.vace import Control
from maxdiffusion.models.layers import Dtypes
from tests.support.parity import drawn_on_devices

SOLVER, STEPS = SOLVERS["unipc"], 4
SCHEDULE = SOLVER.schedule(STEPS, 3.0)
GUIDANCE = [TwoPassGuidance(), BatchedGuidance()]


# ---- the windows


@pytest.mark.parametrize(
    ("windows", "starts"),
    [
        (Windows(41, 21, 4), (0, 17, 20)),  # shifted back: 161 frames in windows of 81
        (Windows(38, 21, 4), (0, 17)),
        (Windows(22, 21, 4), (0, 1)),
        (Windows(21, 21, 4), (0,)),
        (Windows(9, 3, 0), (0, 3, 6)),
        (Windows(9, 4, 3), (0, 1, 2, 3, 4, 5)),
    ],
)
def test_windows_of_one_length_cover_the_video(windows, starts):
    assert windows.starts == starts
    assert {f for number in range(len(starts)) for f in windows.frames_of(number)} == set(range(windows.frames))
    total = np.zeros(windows.frames)
    for start, weights in zip(starts, windows.weights, strict=True):
        assert len(weights) == windows.length and min(weights) > 0
        total[start : start + windows.length] += weights
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_leading_frames_are_in_every_window():
    windows = Windows(9, 5, 1, leading=2)
    assert [windows.frames_of(number) for number in (0, 1)] == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 6, 7, 8, 9, 10]]
    assert [weights[:2] for weights in windows.weights] == [[0.5, 0.5]] * 2


@pytest.mark.parametrize(
    ("rows", "degree", "turns"),
    [
        (1, 1, [[0], [1], [2]]),
        (1, 2, [[0, 1], [2, 2]]),
        (2, 2, [[0], [1], [2]]),  # the batch fills the devices
        (2, 4, [[0, 1], [2, 2]]),
        (3, 2, [[0, 1], [2, 2]]),
        (1, 4, [[0, 1, 2, 2]]),
    ],
)
def test_turns_divide_over_the_devices(rows, degree, turns):
    assert Windows(9, 5, 3).turns(rows, degree) == turns


def temporal_tiler(values, frames, size, stride):
    """DiffSynth-Studio's TemporalTiler_BCTHW on velocities f h w c by their start, in its order of operations."""
    value, weight, border = 0 * np.zeros((frames, *values[0].shape[1:])), np.zeros((frames, 1, 1, 1)), size - stride
    for t in range(0, frames, stride):
        if t - stride >= 0 and t - stride + size >= frames:
            continue
        end, mask = min(t + size, frames), np.ones(min(size, frames - t))
        if border and t:
            mask[:border] = (np.arange(border) + 0.5) / border
        if border and end < frames:
            mask[-border:] = ((np.arange(border) + 0.5) / border)[::-1]
        value[t:end] += values[t] * mask[:, None, None, None]
        weight[t:end] += mask[:, None, None, None]
    return value / weight


@pytest.mark.parametrize("windows", [Windows(38, 21, 4), Windows(17, 9, 1), Windows(25, 7, 1), Windows(9, 3)])
def test_blends_as_diffsynth(windows):
    """Where its last window is whole, and so needs no shift."""
    rng = np.random.default_rng(0)
    values = {start: rng.standard_normal((windows.length, 2, 3, 4)) for start in windows.starts}
    expected = temporal_tiler(values, windows.frames, windows.length, windows.length - windows.overlap)
    velocities = jnp.asarray([[each] for each in values.values()], jnp.float32)
    found = jax.jit(blend, static_argnums=(0, 2))(windows, velocities, 1)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6, atol=1e-6)


# ---- a whole denoise


class Given(NamedTuple):
    """A context, part of which is on the frames."""

    text: Any  # b 4
    control: Any  # b f 4


def velocity(params, x, timestep, context):
    """Mixes frames, unlike at each position of a window."""
    positions = jnp.linspace(-1, 1, x.shape[1])[None, :, None, None, None]
    shift = context.text + jnp.sin(timestep / 200)[:, None]
    mixed = x + positions * x.mean(1, keepdims=True) + context.control[:, :, None, None]
    return x - jnp.tanh(params * mixed + shift[:, None, None, None])


NETWORK = Network(
    lambda params, x, timestep, context: (x.reshape(len(x), -1, 4), (x, timestep)),
    lambda params, tokens, signal, context: velocity(
        params, tokens.reshape(signal[0].shape), signal[1], context
    ).reshape(tokens.shape),
    lambda params, tokens, signal: tokens.reshape(signal[0].shape),
    cut=lambda context, take: context._replace(control=take(context.control)),
)
RNG = np.random.default_rng(1)
FRAMES = 9
CONTEXTS = Contexts(
    *(Given(*(RNG.standard_normal(s).astype(np.float32) for s in ((2, 4), (2, FRAMES, 4)))) for _ in "ab")
)
PARAMS = tuple(map(jnp.float32, (1.0, -0.5)))
X = noise([1, 2], (FRAMES, 2, 3, 4))


def denoiser(guidance=TwoPassGuidance(), scales=(3.0, 1.0), **kwargs):  # noqa: B008
    return Denoiser(NETWORK, expert_steps(SCHEDULE.timesteps, 0.8, *scales), SCHEDULE, SOLVER, guidance, **kwargs)


def run(denoiser, x=X):
    program = denoiser.compile(PARAMS[0], x, CONTEXTS.positive)
    state = program.init(x)
    for params, expert in zip(PARAMS, denoiser.experts, strict=True):
        state = program.advance(params, CONTEXTS, state, expert)
    return np.asarray(state.x)


def plainly(windows, evaluate, experts, x):
    """Written out: `evaluate` (expert, branch, frames, x, timestep) gives a window's velocity, guided, then blended."""
    table, state = SOLVER.table(SCHEDULE), SOLVER.init(x)
    weights = [np.asarray(each, np.float32)[:, None, None, None] for each in windows.weights]
    for number, expert in enumerate(experts):
        for i in range(expert.start, expert.stop):
            total = np.zeros(x.shape, np.float32)
            for window, weight in enumerate(weights):
                at = windows.frames_of(window)
                time = jnp.full((len(x),), SCHEDULE.timesteps[i])
                c, u = (np.asarray(evaluate(number, branch, at, state.x[:, at], time)) for branch in (0, 1))
                total[:, at] += weight * (u + expert.guidance_scale * (c - u))
            state = SOLVER.step(state, jax.tree.map(lambda a, i=i: np.float32(a[i]), table), jnp.asarray(total))
    return np.asarray(state.x)


def tiny(number, branch, at, x, time):
    context = CONTEXTS[branch]
    return velocity(PARAMS[number], x, time, context._replace(control=context.control[:, at]))


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("scan", [None, 100])
@pytest.mark.parametrize("windows", [Windows(FRAMES, 5, 2), Windows(FRAMES - 1, 6, 2, leading=1)])
def test_a_denoise_over_windows_is_the_run_written_out(windows, scan, guidance):
    """Of two experts, the second without guidance; the last of three windows is shifted."""
    over = denoiser(guidance, scan=scan, windows=windows)
    np.testing.assert_allclose(run(over), plainly(windows, tiny, over.experts, X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("scan", [None, 100])
def test_one_window_is_the_plain_run_bit_for_bit(guidance, scan):
    plain, one = (denoiser(guidance, scan=scan, windows=each) for each in (None, Windows(FRAMES, FRAMES)))
    np.testing.assert_array_equal(run(one), run(plain))


@dataclasses.dataclass(frozen=True)
class OnlyOnce:
    """Adds the residual of an expert's first step in all its steps."""

    def reads(self, step):
        return True

    def table(self, schedule):
        return ()

    def init(self, x, tokens):
        return jax.ShapeDtypeStruct((), jnp.int32), tokens

    def __call__(self, row, call, state):
        count, kept = state
        kept = jnp.where(count == 0, call.trunk(call.tokens) - call.tokens, kept)
        return call.head(call.tokens + kept), (count + 1, kept)


def test_each_window_has_a_cache_of_its_own():
    windows, kept = Windows(FRAMES, 5, 2), {}

    def evaluate(number, branch, at, x, time):
        key = (number, branch, *at)
        if key not in kept:
            kept[key] = tiny(number, branch, at, x, time) - x
        return x + kept[key]

    over = denoiser(cache=OnlyOnce(), windows=windows)
    np.testing.assert_allclose(run(over), plainly(windows, evaluate, over.experts, X), rtol=1e-5, atol=1e-5)


# ---- the transformer


@pytest.mark.slow
def test_a_vace_transformer_over_windows_on_one_device_and_on_eight():
    """Three windows over data 2 x ring 2 x ulysses 2, of 15 tokens each and a reference frame."""
    config = DiTConfig(2, 2, 12, 40, 4, 4, text_dim=20, freq_dim=32, adapter=VACEConfig((0, 1), 6))
    windows, rng = Windows(10, 4, 1, leading=1), np.random.default_rng(0)
    x = noise([1], (11, 6, 2, 4))
    control = Control(jnp.asarray(rng.standard_normal((1, 11, 6, 2, 6)), jnp.float32), jnp.ones((1, 2)))
    texts = jnp.asarray(rng.standard_normal((2, 1, 7, 20)), jnp.float32)
    contexts = [Context(text, adapter=control) for text in texts]
    experts = expert_steps(SCHEDULE.timesteps, None, 3.0, None)

    def model(plan):
        return drawn_on_devices(WanTransformer(config, plan, Dtypes()))

    def latents(plan, guidance):
        transformer = model(plan)
        network, params = split(transformer)
        prepared = Contexts(*(nnx.jit(WanTransformer.prepare)(transformer, each) for each in contexts))
        return Denoiser(network, experts, SCHEDULE, SOLVER, guidance, windows=windows).run(params, x, prepared)

    transformer, call = model(AttentionPlan()), nnx.jit(WanTransformer.__call__)

    def alone(number, branch, at, x, time):
        cut = contexts[branch]._replace(adapter=control._replace(latents=control.latents[:, at]))
        return call(transformer, x, time, cut)

    expected = plainly(windows, alone, experts, x)
    one = latents(AttentionPlan(), TwoPassGuidance())
    np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)
    mesh = parallel.make_mesh(parallel.Degrees(data=2, context=4), ulysses=2)
    with parallel.use(parallel.Placement(mesh, parallel.rules_for())):
        plan = AttentionPlan("ulysses_ring", "dot_product", ring=2, ulysses=2)
        for guidance in GUIDANCE:
            np.testing.assert_allclose(latents(plan, guidance), one, rtol=1e-4, atol=1e-5)
