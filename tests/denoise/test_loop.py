"""The loop: step by step and scan give the same numbers, and what varies enters as values."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxdiffusion.denoise import (
    SOLVERS,
    BatchedGuidance,
    Contexts,
    Denoiser,
    NoGuidance,
    Segment,
    SingleExpert,
    TwoExperts,
    TwoPassGuidance,
    UniPC,
    experts,
    noise,
    split,
)

RNG = np.random.default_rng(1)
CONTEXTS = Contexts(*jnp.asarray(RNG.standard_normal((2, 2, 3, 4)), jnp.float32))


class Tiny(nnx.Module):
    """Two matrices in place of a transformer."""

    def __init__(self, rngs: nnx.Rngs):
        self.inner = nnx.Linear(4, 4, rngs=rngs)
        self.text = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, latents, timestep, context):
        shift = jnp.sin(timestep / 200)[:, None] + self.text(context).mean(1)
        return latents - jnp.tanh(self.inner(latents) + shift[:, None, None, None, :])


@dataclasses.dataclass(frozen=True)
class EveryOther:
    """A step cache: odd steps reuse the velocity of the step before."""

    def init(self, x):
        return jnp.zeros_like(x)

    def velocity(self, velocity, state, step, x):
        v = jax.lax.cond(step % 2 == 0, velocity, lambda _: state, x)
        return v, v


@pytest.fixture(scope="module")
def tiny():
    return split(Tiny(nnx.Rngs(0)))


@pytest.fixture
def x():
    return noise([1, 2], (2, 4, 4, 4))


def denoiser(tiny, steps=6, scale=3.0, solver=SOLVERS["unipc"], guidance=TwoPassGuidance(), **kwargs):  # noqa: B008
    schedule = solver.schedule(steps, 3.0)
    kwargs.setdefault("segments", SingleExpert(scale).segments(schedule.timesteps))
    return Denoiser(tiny[0], schedule=schedule, solver=solver, guidance=guidance, **kwargs)


def plainly(network, params_at, solver, steps, scale, x, reuse=False):
    """The run written out, nothing compiled ahead: guidance, solver, step by step."""
    schedule = solver.schedule(steps, 3.0)
    table, state, v = solver.table(schedule), solver.init(x), None
    for i, t in enumerate(schedule.timesteps):
        if not (reuse and i % 2):
            time = jnp.full((x.shape[0],), t)
            c, u = (network(params_at(t), state.x, time, context) for context in CONTEXTS)
            v = u + (scale(t) if callable(scale) else scale) * (c - u)
        state = solver.step(state, jax.tree.map(lambda a, i=i: np.float32(a[i]), table), v)
    return np.asarray(state.x)


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_scan_and_the_run_written_out_agree(tiny, x, name):
    expected = plainly(tiny[0], lambda t: tiny[1], SOLVERS[name], 6, 3.0, x)
    steps = denoiser(tiny, solver=SOLVERS[name]).run(tiny[1], x, CONTEXTS)
    scan = denoiser(tiny, solver=SOLVERS[name], scan=True).run(tiny[1], x, CONTEXTS)
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


@pytest.mark.parametrize("scan", [False, True])
def test_two_experts_with_a_guidance_scale_each(tiny, x, scan):
    network, high = tiny
    low = jax.tree.map(lambda a: -2 * a, high)
    expected = plainly(network, lambda t: high if t >= 875 else low, UniPC(), 6, lambda t: 3.0 if t >= 875 else 1.5, x)
    segments = TwoExperts(0.875, 3.0, 1.5).segments(UniPC().schedule(6, 3.0).timesteps)
    assert [segment[:3] for segment in segments] == [(0, 2, "transformer"), (2, 6, "transformer_2")]
    program = denoiser(tiny, segments=segments, scan=scan).compile(high, x, CONTEXTS)
    state = program.init(x)
    for params, segment in zip((high, low), segments, strict=True):
        state = program.advance(params, CONTEXTS, state, segment)
    np.testing.assert_allclose(state.x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shift", "boundary", "high"), [(12.0, 0.875, 26), (5.0, 0.9, 15)])
def test_steps_of_the_official_experts(shift, boundary, high):
    """A14B's 40 steps, from text and from an image; the figures are those of the reference's scheduler."""
    segments = TwoExperts(boundary, 4.0, 3.0).segments(UniPC().schedule(40, shift).timesteps)
    assert [segment[:2] for segment in segments] == [(0, high), (high, 40)]


def test_experts_without_steps_are_not_named():
    timesteps = np.array([999.0, 900.0, 500.0], np.float32)
    assert TwoExperts(0.9, 2.0, 3.0).segments(timesteps) == (
        Segment(0, 2, "transformer", 2.0),
        Segment(2, 3, "transformer_2", 3.0),
    )
    assert TwoExperts(0.4, 2.0, 3.0).segments(timesteps) == (Segment(0, 3, "transformer", 2.0),)


@pytest.mark.parametrize(
    ("residency", "loads", "order"),
    [("together", "ab", "a0 b0 a1 b1"), ("in_turn", "ab", "a0 a1 b0 b1")],
)
def test_residency(residency, loads, order):
    """In turn at most one net is held, and each is still loaded once."""
    made, alive = [], []

    def load(net):
        made.append(net)
        module = Tiny(nnx.Rngs(0))
        alive.append(weakref.ref(module))
        return module

    residents = experts.Residents(load, residency)
    segments, seen, most = (Segment(0, 1, "a"), Segment(1, 2, "b")), [], 0
    for batch, segment in experts.turns(segments, range(2), residency):
        assert residents[segment.net] is residents[segment.net]
        seen.append(f"{segment.net}{batch}")
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
    assert "".join(made) == loads and " ".join(seen) == order
    assert most == (1 if residency == "in_turn" else 2)


@pytest.mark.parametrize("scan", [False, True])
def test_a_cache_needs_no_change_of_the_loop(tiny, x, scan):
    expected = plainly(tiny[0], lambda t: tiny[1], UniPC(), 6, 3.0, x, reuse=True)
    cached = denoiser(tiny, cache=EveryOther(), scan=scan).run(tiny[1], x, CONTEXTS)
    np.testing.assert_allclose(cached, expected, rtol=1e-5, atol=1e-5)


def test_on_step_reports_every_step_and_the_noise_stays_valid(tiny, x):
    seen = []
    program = denoiser(tiny).compile(tiny[1], x, CONTEXTS)
    assert program.seconds > 0
    before = np.array(x)
    latents = program(tiny[1], x, CONTEXTS, on_step=lambda i, n, state: seen.append((i, n, np.array(state.x))))
    assert [(i, n) for i, n, _ in seen] == [(i, 6) for i in range(6)]
    np.testing.assert_array_equal(seen[-1][2], latents)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(program(tiny[1], x, CONTEXTS), latents)  # a program serves any number of runs


def test_scan_reports_once(tiny, x):
    seen = []
    denoiser(tiny, scan=True).run(tiny[1], x, CONTEXTS, on_step=lambda i, n, state: seen.append((i, n)))
    assert seen == [(5, 6)]


def test_a_kept_state_goes_on_where_it_was(tiny, x):
    program = denoiser(tiny).compile(tiny[1], x, CONTEXTS)
    kept = {}

    def keep(i, n, state):
        kept[i] = jax.tree.map(np.array, state)

    latents = program(tiny[1], x, CONTEXTS, on_step=keep)
    again = program.advance(tiny[1], CONTEXTS, jax.tree.map(jnp.asarray, kept[2]), Segment(3, 6))
    np.testing.assert_array_equal(again.x, latents)


def test_the_compiled_step_depends_on_no_schedule_scale_or_parameter(tiny, x):
    """Else every change of steps, shift or guidance scale would compile a 14B network anew."""

    def text(steps, scale, params):
        d = denoiser(tiny, steps=steps, scale=scale)
        row = d._rows(d.plan(), 0, 1)
        return jax.jit(d.step).lower(params, CONTEXTS, d.init(x), row).as_text()

    assert text(6, 3.0, tiny[1]) == text(50, 5.0, jax.tree.map(lambda a: 2 * a, tiny[1]))


def test_compiles_from_shapes_alone(tiny, x):
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (tiny[1], x, CONTEXTS))
    program = denoiser(tiny, guidance=NoGuidance()).compile(*abstract)
    assert program.programs[1].memory_analysis() is not None
