"""From half to whole height and width: scipy's transform, the published levels, the solver that begins anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from maxdiffusion.denoise.experts import ExpertSteps, described, half_size_first
from maxdiffusion.denoise.recipe import Recipe
from maxdiffusion.denoise.solvers import SOLVERS, Euler
from maxdiffusion.denoise.upsampling import halve, level, raised, upsample


def test_frequencies_of_the_smaller_latents_are_the_lowest_of_the_larger():
    """`dct_rewind`: the transform in the corner of one of noise, back, times 2 / (1 + sigma)."""
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 10, 4)).astype(np.float32)
    noise, sigma = np.random.default_rng(1).standard_normal((2, 3, 12, 20, 4)).astype(np.float32), 0.7
    grid = scipy.fft.dctn(sigma * noise.astype(np.float64), axes=(2, 3), norm="ortho")
    grid[:, :, :6, :10] = scipy.fft.dctn(x.astype(np.float64), axes=(2, 3), norm="ortho")
    want = scipy.fft.idctn(grid, axes=(2, 3), norm="ortho") * 2 / (1 + sigma)
    found = upsample(jnp.asarray(x), jnp.asarray(noise), sigma)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, atol=1e-5)
    corner = scipy.fft.dctn(noise.astype(np.float64), axes=(2, 3), norm="ortho")[:, :, :6, :10]
    np.testing.assert_allclose(halve(jnp.asarray(noise)), scipy.fft.idctn(corner, axes=(2, 3), norm="ortho"), atol=1e-5)


def test_a_constant_video_in_noise_is_the_same_video_in_more_noise():
    clean, sigma = 0.5, 0.8
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 64, 64, 16)), jnp.float32)
    smaller = halve(noise)
    assert np.std(smaller) == pytest.approx(1, rel=0.01)
    found = upsample((1 - sigma) * clean + sigma * smaller, noise, sigma)
    more = raised(sigma)
    assert more == pytest.approx(2 * 0.8 / 1.8)
    assert np.mean(found) == pytest.approx((1 - more) * clean, abs=0.01)
    assert np.std(found) == pytest.approx(more, rel=0.01)


@pytest.mark.parametrize(
    ("size", "levels"),
    [((60, 104), (0.864, 0.817, 0.737, 0.660)), ((90, 160), (0.787, 0.722, 0.619, 0.528))],
)
def test_the_levels_of_the_switch_are_the_published_ones(size, levels):
    assert [level(*size, loss) for loss in (0.01, 0.02, 0.05, 0.1)] == pytest.approx(levels, abs=6e-4)


def test_the_steps_above_the_level_are_the_published_ones():
    sigmas = Euler().schedule(50, 5.0).sigmas[:-1]
    assert [int((sigmas > level(60, 104, loss)).sum()) for loss in (0.01, 0.02, 0.05, 0.1)] == [23, 27, 33, 37]


def recipe(solver, **more):
    return Recipe.of(solver, (12, None), (5.0, None), scales=(3.0, 2.0), boundary=0.875, **more)


@pytest.mark.parametrize("solver", ["unipc", "euler", "dpmpp_2m"])
def test_the_solver_begins_anew_at_the_raised_level(solver):
    """Its table is that of a schedule which starts there; exact on a straight path, whose end all steps find."""
    whole, steps = recipe(solver), 5
    found = whole.half_size_first(steps)
    assert found.half_steps == 5 and found.guided
    sigma = raised(float(whole.schedule.sigmas[steps]))
    np.testing.assert_array_equal(found.schedule.sigmas, whole.schedule.sigmas)
    np.testing.assert_array_equal(
        np.delete(found.schedule.timesteps, steps), np.delete(whole.schedule.timesteps, steps)
    )
    assert 0 <= 1000 * sigma - found.schedule.timesteps[steps] < 1
    table = found.solver.table(found.schedule)
    clean, noise = jnp.full((1, 1, 2, 2, 1), 0.3), jnp.full((1, 1, 2, 2, 1), -1.2)
    levels = [sigma, *whole.schedule.sigmas[steps + 1 :]]
    state = found.solver.init((1 - levels[0]) * clean + levels[0] * noise)
    for i in range(steps, len(whole.schedule)):
        row = jax.tree.map(lambda a, i=i: np.float32(a[i]), table)
        state = found.solver.step(state, row, noise - clean)
    np.testing.assert_allclose(state.x, clean, atol=1e-5)
    before = SOLVERS[solver].table(whole.schedule)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:steps], b[:steps]), table, before)


def test_experts_are_divided_at_the_switch():
    two = ExpertSteps(0, 8, "transformer", 3.0), ExpertSteps(8, 12, "transformer_2", 2.0)
    assert [(e.start, e.stop, e.half) for e in half_size_first(two, 5)] == [(0, 5, True), (5, 8, False), (8, 12, False)]
    assert [(e.start, e.stop, e.half) for e in half_size_first(two, 9)] == [(0, 8, True), (8, 9, True), (9, 12, False)]
    assert "5 of transformer at half height and width with guidance (10 passes)" in described(half_size_first(two, 5))
