"""Solvers against a flow whose trajectories are known in closed form, in float64.

Data N(m, s^2): x_sigma has mean a m and variance v = a^2 s^2 + sigma^2 with a = 1 - sigma, the velocity E[noise - x_0 | x]
is affine in x, and (x - a m) / sqrt(v) is constant along a trajectory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxdiffusion.denoise import DPMpp2M, Euler, Schedule, UniPC

MEAN, STD = 0.7, 0.4


def velocity(x, sigma):
    a = 1 - sigma
    variance = a**2 * STD**2 + sigma**2
    return (sigma - a * STD**2) / variance * (x - a * MEAN) - MEAN


def exact(x, start, end):
    def spread(sigma):
        return np.sqrt((1 - sigma) ** 2 * STD**2 + sigma**2)

    return (1 - end) * MEAN + spread(end) / spread(start) * (x - (1 - start) * MEAN)


def walk(solver, sigmas, steps):
    """The latents after `steps` steps along `sigmas`, which may go on: the order falls only at the very end."""
    x = jnp.linspace(-2.0, 2.0, 8).reshape(1, 1, 2, 2, 2)
    assert x.dtype == jnp.float64
    schedule = Schedule(sigmas, 1000 * sigmas[:-1])
    table, state = solver.table(schedule), solver.init(x)
    for i in range(steps):
        row = jax.tree.map(lambda a, i=i: a[i], table)
        state = solver.step(state, row, velocity(state.x, np.float64(schedule.sigmas[i])))
    expected = exact(x, float(schedule.sigmas[0]), float(schedule.sigmas[steps]))
    return float(jnp.abs(state.x - expected).max())


def slope(solver, grid):
    with jax.enable_x64(True):
        counts = np.array([16, 32, 64, 128])
        errors = [walk(solver, grid(n), n) for n in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def smooth(n):
    """N steps from 0.95 to 0.15, and four more beyond."""
    h = 0.8 / n
    return (
        0.95 - h * np.arange(n + 5) if h * 4 < 0.15 else np.append(0.95 - h * np.arange(n + 1), [0.1, 0.06, 0.04, 0.03])
    )


@pytest.mark.parametrize(
    ("solver", "order"),
    [(Euler(), 1), (DPMpp2M(), 2), (UniPC(1), 2), (UniPC(2), 3), (UniPC(3), 4)],
    ids=["euler", "dpmpp_2m", "unipc1", "unipc2", "unipc3"],
)
def test_order(solver, order):
    """UniPC-p is of order p + 1: its corrector adds one."""
    assert slope(solver, smooth) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(
    ("solver", "order"), [(Euler(), 1), (DPMpp2M(), 1), (UniPC(2), 1)], ids=["euler", "dpmpp_2m", "unipc2"]
)
def test_whole_run(solver, order):
    with jax.enable_x64(True):
        errors = [walk(solver, solver.schedule(n, 5.0).sigmas, n) for n in (8, 16, 32, 64)]
    print(solver, errors)
