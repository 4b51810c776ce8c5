"""Solvers against a flow whose trajectories are known in closed form, in float64.

Data N(m, s^2): x_sigma has mean a m and variance v = a^2 s^2 + sigma^2 with a = 1 - sigma, the velocity
E[noise - x_0 | x] is affine in x, and (x - a m) / sqrt(v) is constant along a trajectory.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxdiffusion.denoise.schedule import Schedule
from maxdiffusion.denoise.solvers import DPMpp2M, Euler, UniPC

MEAN, STD = 0.7, 1.0


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


@pytest.mark.parametrize(
    ("solver", "order"),
    [(Euler(), 1), (DPMpp2M(), 2), (UniPC(1), 2), (UniPC(2), 3), (UniPC(3), 3)],
    ids=["euler", "dpmpp_2m", "unipc1", "unipc2", "unipc3"],
)
def test_order_of_convergence(solver, order):
    """UniPC-p is of order p + 1 by its corrector, but never above 3: its first step has a local error of h^3."""
    counts = np.array([32, 64, 128])
    with jax.enable_x64(True):
        errors = [walk(solver, np.append(np.linspace(0.8, 0.3, n + 1), [0.25, 0.2, 0.15, 0.1]), n) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.15 < slope < order + 0.35, errors


@pytest.mark.parametrize("solver", [DPMpp2M(), UniPC(2), UniPC(3)], ids=["dpmpp_2m", "unipc2", "unipc3"])
def test_whole_run_beats_euler(solver):
    """From pure noise to sigma 0 as a user runs it; the last step alone is of first order in the log-SNR."""
    with jax.enable_x64(True):
        error, euler = (walk(s, s.schedule(50, 3.0).sigmas, 50) for s in (solver, Euler()))
    assert error < euler / 5
