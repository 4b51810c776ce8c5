"""Every step of every solver against its diffusers scheduler, fp32, within 1e-4 relative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from maxdiffusion.denoise.solvers import DPMpp2M, Euler, UniPC

SHAPE = (1, 2, 4, 4, 3)


def unipc(order):
    def make(shift):
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
            solver_order=order,
            solver_type="bh2",
        )

    return UniPC(order), make


def dpmpp(shift):
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, algorithm_type="dpmsolver++"
    )


CASES = {
    "unipc1": unipc(1),
    "unipc2": unipc(2),
    "unipc3": unipc(3),
    "euler": (Euler(), lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift)),
    "dpmpp_2m": (DPMpp2M(), dpmpp),
}


def velocity(x: np.ndarray, t: float, noise: np.ndarray) -> np.ndarray:
    """Deterministic, nonlinear in x and t, pulled towards a fixed point so that trajectories stay of order one."""
    return (noise - np.tanh(2 * x + np.sin(t / 150)) * np.cos(3 * noise)).astype(np.float32)


@pytest.mark.parametrize(
    ("steps", "shift"), [(1, 5.0), (2, 3.0), (3, 1.0), (10, 1.0), (10, 5.0), (50, 3.0), (50, 12.0)]
)
@pytest.mark.parametrize("name", CASES)
def test_every_step(name, steps, shift):
    solver, make = CASES[name]
    scheduler = make(shift)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    schedule = solver.schedule(steps, shift)
    noise = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    table = jax.tree.map(np.float32, solver.table(schedule))
    step = jax.jit(solver.step)
    state, expected, worst = solver.init(jnp.asarray(noise)), noise, 0.0
    for i, t in enumerate(scheduler.timesteps):
        ours = velocity(np.asarray(state.x), float(t), noise)
        theirs = velocity(expected, float(t), noise)
        state = step(state, jax.tree.map(lambda a, i=i: a[i], table), jnp.asarray(ours))
        expected = scheduler.step(torch.from_numpy(theirs), t, torch.from_numpy(expected))[0].numpy()
        error = np.abs(np.asarray(state.x) - expected).max() / np.abs(expected).max()
        assert error < 1e-4, f"step {i}: {error:.1e}"
        worst = max(worst, error)
    print(f"{name}, {steps} steps, shift {shift:g}: at most {worst:.1e}")
