"""The loop: step by step and scan give the same numbers, and what varies enters as values."""

import collections
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxdiffusion.denoise.experts import ExpertSteps, LoadedExperts, execution_order, expert_steps
from maxdiffusion.denoise.guidance import BatchedGuidance, TwoPassGuidance
from maxdiffusion.denoise.loop import Denoiser
from maxdiffusion.denoise.network import Network, split
from maxdiffusion.denoise.noise import noise, step_keys
from maxdiffusion.denoise.solvers import SOLVERS, UniPC
from maxdiffusion.models.dit.context import Contexts

RNG = np.random.default_rng(1)
KEYS = step_keys([1, 2])
CONTEXTS = Contexts(*jnp.asarray(RNG.standard_normal((2, 2, 3, 4)), jnp.float32))


class Tiny(nnx.Module):
    """Two matrices in place of a transformer."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(4, 4, rngs=rngs)
        self.text = nnx.Linear(4, 4, rngs=rngs)

    def embed(self, latents, timestep, context):
        shift = jnp.sin(timestep / 200)[:, None] + self.text(context).mean(1)
        return latents, shift[:, None, None, None, :]

    def trunk(self, tokens, shift, context):
        return tokens - jnp.tanh(self.inner(tokens) + shift)

    def head(self, tokens, shift):
        return tokens


@pytest.fixture(scope="module")
def tiny():
    return split(Tiny(nnx.Rngs(0)))


@pytest.fixture
def x():
    return noise([1, 2], (2, 4, 4, 4))


def denoiser(tiny, steps=6, scale=3.0, solver=SOLVERS["unipc"], guidance=TwoPassGuidance(), **kwargs):  # noqa: B008
    kwargs.setdefault("experts", (ExpertSteps(0, steps, guidance_scale=scale),))
    return Denoiser(tiny[0], schedule=solver.schedule(steps, 3.0), solver=solver, guidance=guidance, **kwargs)


def plainly(network, params_at, solver, steps, scale_at, x):
    """The run written out, nothing compiled ahead: both branches of guidance, solver, step by step."""
    schedule = solver.schedule(steps, 3.0)
    table, state = solver.table(schedule), solver.init(x, jnp.asarray(KEYS))
    for i, t in enumerate(schedule.timesteps):
        time, velocities = jnp.full((x.shape[0],), t), []
        for context in CONTEXTS:
            tokens, signal = network.embed(params_at(t), state.x, time, context)
            velocities.append(network.head(params_at(t), network.trunk(params_at(t), tokens, signal, context), signal))
        c, u = velocities
        state = solver.step(state, jax.tree.map(lambda a, i=i: np.float32(a[i]), table), u + scale_at(t) * (c - u))
    return np.asarray(state.x)


def with_own_parameters(program, experts, x, contexts=CONTEXTS):
    """A run whose experts have parameters of their own."""
    state = program.init(x)
    for params, expert in zip(experts, program.denoiser.experts, strict=True):
        state = program.advance(params, contexts, state, expert)
    return state.x


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_scan_and_the_run_written_out_agree(tiny, x, name):
    expected = plainly(tiny[0], lambda t: tiny[1], SOLVERS[name], 6, lambda t: 3.0, x)
    steps = denoiser(tiny, solver=SOLVERS[name]).run(tiny[1], x, CONTEXTS, keys=KEYS)
    scan = denoiser(tiny, solver=SOLVERS[name], scan=100).run(tiny[1], x, CONTEXTS, keys=KEYS)
    assert steps.dtype == jnp.float32 and steps.shape == x.shape
    np.testing.assert_allclose(steps, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scan, steps, rtol=1e-5, atol=1e-5)


def test_batched_equals_two_pass(tiny, x):
    two = denoiser(tiny).run(tiny[1], x, CONTEXTS)
    one = denoiser(tiny, guidance=BatchedGuidance()).run(tiny[1], x, CONTEXTS)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_each_prompt_of_a_batch_is_as_if_alone(tiny, x):
    both = denoiser(tiny, guidance=BatchedGuidance()).run(tiny[1], x, CONTEXTS)
    for i in range(2):
        contexts = jax.tree.map(lambda a, i=i: a[i : i + 1], CONTEXTS)
        alone = denoiser(tiny, guidance=BatchedGuidance()).run(tiny[1], x[i : i + 1], contexts)
        np.testing.assert_allclose(both[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", [None, 100])
@pytest.mark.parametrize("scales", [(3.0, 1.5), (3.0, 1.0), (1.0, 3.0), (1.0, 1.0)])
def test_two_experts_with_a_guidance_scale_each(tiny, x, scales, scan):
    """A scale of 1, whose negative branch is not computed, gives what the formula of both branches gives."""
    network, high = tiny
    low = jax.tree.map(lambda a: -2 * a, high)
    expected = plainly(network, lambda t: high if t >= 875 else low, UniPC(), 6, lambda t: scales[int(t < 875)], x)
    both = expert_steps(UniPC().schedule(6, 3.0).timesteps, 0.875, *scales)
    assert [expert[:3] for expert in both] == [(0, 2, "transformer"), (2, 6, "transformer_2")]
    program = denoiser(tiny, experts=both, scan=scan).compile(high, x, CONTEXTS.positive)
    contexts = CONTEXTS if 3.0 in scales else Contexts(CONTEXTS.positive)
    np.testing.assert_allclose(with_own_parameters(program, (high, low), x, contexts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", [None, 100])
@pytest.mark.parametrize(("guidance", "pair"), [(TwoPassGuidance(), [2, 2]), (BatchedGuidance(), [4])])
@pytest.mark.parametrize("scales", [(3.0, 3.0), (3.0, 1.0), (1.0, 3.0), (1.0, 1.0)])
def test_only_guided_steps_compute_both_branches(x, scales, guidance, pair, scan):
    seen = collections.defaultdict(list)

    def velocity(params, x, timestep, context):
        rows = len(x)
        jax.debug.callback(lambda t: seen[float(t)].append(rows), timestep[0])
        return params * x

    solver = SOLVERS["euler"]
    both = expert_steps(solver.schedule(5, 3.0).timesteps, 0.8, *scales)
    run = Denoiser(Network.of(velocity), both, solver.schedule(5, 3.0), solver, guidance, scan=scan)
    run.run(jnp.float32(1), x, CONTEXTS)
    jax.effects_barrier()
    timesteps = run.schedule.timesteps
    assert seen == {float(t): [2] if scales[int(t < 800)] == 1 else pair for t in timesteps}
    assert len(run.lower(jnp.float32(1), x, CONTEXTS.positive)[1]) == (2 if scan else len(set(scales)))


@pytest.mark.parametrize(
    ("residency", "batches", "loads", "order"),
    [
        ("together", 2, "ab", "a0 b0 a1 b1"),
        ("in_turn", 2, "ab", "a0 a1 b0 b1"),
        pytest.param(
            *("in_turn", 10, "abab"),
            " ".join([f"a{i}" for i in range(8)] + [f"b{i}" for i in range(8)] + ["a8 a9 b8 b9"]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_residency(residency, batches, loads, order):
    """In turn at most one net is held, and each is loaded once for eight batches, which are whole before the others."""
    made, alive = [], []

    def load(net):
        made.append(net)
        module = Tiny(nnx.Rngs(0))
        alive.append(weakref.ref(module))
        return module

    loaded = LoadedExperts(load, residency)
    both, seen, most = (ExpertSteps(0, 1, "a"), ExpertSteps(1, 2, "b")), [], 0
    for batch, _, expert in execution_order(both, range(batches), residency):
        assert loaded[expert.net] is loaded[expert.net]
        seen.append(f"{expert.net}{batch}")
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
    assert "".join(made) == loads and " ".join(seen) == order
    assert most == (1 if residency == "in_turn" else 2)


def test_on_step_reports_every_step_and_the_noise_stays_valid(tiny, x):
    seen = []
    program = denoiser(tiny).compile(tiny[1], x, CONTEXTS.positive)
    assert program.seconds > 0
    before = np.array(x)
    latents = program(tiny[1], x, CONTEXTS, on_step=lambda i, n, state: seen.append((i, n, np.array(state.x))))
    assert [(i, n) for i, n, _ in seen] == [(i, 6) for i in range(6)]
    np.testing.assert_array_equal(seen[-1][2], latents)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(program(tiny[1], x, CONTEXTS), latents)  # a program serves any number of runs


def test_scan_reports_once(tiny, x):
    seen = []
    denoiser(tiny, scan=100).run(tiny[1], x, CONTEXTS, on_step=lambda i, n, state: seen.append((i, n)))
    assert seen == [(5, 6)]


def test_a_kept_state_goes_on_where_it_was(tiny, x):
    program = denoiser(tiny).compile(tiny[1], x, CONTEXTS.positive)
    kept = {}

    def keep(i, n, state):
        kept[i] = jax.tree.map(np.array, state)

    latents = program(tiny[1], x, CONTEXTS, on_step=keep)
    again = program.advance(
        tiny[1], CONTEXTS, jax.tree.map(jnp.asarray, kept[2]), ExpertSteps(3, 6, guidance_scale=3.0)
    )
    np.testing.assert_array_equal(again.x, latents)


def test_the_compiled_step_depends_on_no_schedule_scale_or_parameter(tiny, x):
    """Else every change of steps, shift or guidance scale would compile a 14B network anew."""

    def text(steps, scale, params):
        return denoiser(tiny, steps=steps, scale=scale).lower(params, x, CONTEXTS.positive)[1][True, 1].as_text()

    assert text(6, 3.0, tiny[1]) == text(50, 5.0, jax.tree.map(lambda a: 2 * a, tiny[1]))


def test_compiles_from_shapes_alone(tiny, x):
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (tiny[1], x, CONTEXTS.positive))
    program = denoiser(tiny).compile(*abstract)
    assert program.programs[True, 1].memory_analysis() is not None
