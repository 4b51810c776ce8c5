"""Every step of every solver against its schedulers in the official code and in diffusers."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_flow_match_lcm

from maxdiffusion.denoise.noise import step_keys, step_noise
from maxdiffusion.denoise.schedule import explicit_levels
from maxdiffusion.denoise.solvers import DPMpp2M, Euler, Renoise, UniPC
from tests.support import official

SHAPE = (1, 2, 4, 4, 3)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def unipc(order):
    return UniPC(order), lambda shift: UniPCMultistepScheduler(flow_shift=shift, solver_order=order, **FLOW)


CASES = {
    "unipc1": unipc(1),
    "unipc2": unipc(2),
    "unipc3": unipc(3),
    "euler": (Euler(), lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift)),
    "dpmpp_2m": (DPMpp2M(), lambda shift: DPMSolverMultistepScheduler(flow_shift=shift, **FLOW)),
}
RUNS = [(1, 5.0), (2, 3.0), (3, 1.0), (10, 1.0), (10, 5.0), (50, 3.0), (50, 12.0)]


def velocity(x: np.ndarray, t: float, noise: np.ndarray) -> np.ndarray:
    """Deterministic, nonlinear in x and t, pulled towards a fixed point so that trajectories stay of order one."""
    return noise - np.tanh(2 * x + np.sin(t / 150)) * np.cos(3 * noise)


def errors(solver, schedule, scheduler):
    """Of each step, the largest error over the largest value, both in float64."""
    scheduler.sigmas = scheduler.sigmas.double()  # of fp32: log(1 - sigma) alone would be off by 1e-6
    scheduler.set_begin_index(0)
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    table, step = solver.table(schedule), jax.jit(solver.step)
    state, expected = solver.init(jnp.asarray(noise)), noise
    for i, t in enumerate(scheduler.timesteps):
        ours = velocity(np.asarray(state.x), float(t), noise)
        theirs = velocity(expected, float(t), noise)
        state = step(state, jax.tree.map(lambda a, i=i: a[i], table), jnp.asarray(ours))
        with mock.patch.object(torch, "float32", torch.float64):  # to which some would round the sample
            expected = scheduler.step(torch.from_numpy(theirs), t, torch.from_numpy(expected))[0].numpy()
        yield np.abs(np.asarray(state.x) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("steps", "shift"), RUNS)
@pytest.mark.parametrize("name", CASES)
def test_every_step_of_diffusers(name, steps, shift):
    solver, make = CASES[name]
    scheduler = make(shift)
    scheduler.set_timesteps(steps)
    with jax.enable_x64(True):
        found = list(errors(solver, solver.schedule(steps, shift, "diffusers"), scheduler))
    print(f"{name}, {steps} steps, shift {shift:g}: at most {max(found):.1e}")
    assert max(found) < 1e-6, found


@pytest.mark.parametrize(("steps", "shift"), RUNS)
@pytest.mark.parametrize(("name", "solver"), [("unipc", UniPC()), ("dpm++", DPMpp2M())])
def test_every_step_of_the_official_code(name, solver, steps, shift):
    with jax.enable_x64(True):
        found = list(errors(solver, solver.schedule(steps, shift, "official"), official.scheduler(name, steps, shift)))
    print(f"official {name}, {steps} steps, shift {shift:g}: at most {max(found):.1e}")
    assert max(found) < 1e-12, found


def explicit(name):
    """UniPC, Euler and the sampler of distilled models in diffusers, at shift 1, where levels are taken as given."""
    made = {
        "unipc": lambda: UniPCMultistepScheduler(**FLOW),
        "euler": FlowMatchEulerDiscreteScheduler,
        "renoise": FlowMatchLCMScheduler,
    }
    return {"unipc": UniPC(), "euler": Euler(), "renoise": Renoise()}[name], made[name]()


SIGMAS = [[1.0, 0.757, 0.522], [1.0, 0.9375, 5 / 6, 0.625], [0.98765, 0.93378, 0.8529, 0.60898], [0.5]]


@pytest.mark.parametrize("sigmas", SIGMAS, ids=lambda sigmas: f"{len(sigmas)} from {sigmas[0]:g}")
@pytest.mark.parametrize("name", ["unipc", "euler", "renoise"])
def test_every_step_of_explicit_levels(name, sigmas):
    """In float32; the noise of `renoise`, which diffusers draws from a generator, is ours in both."""
    solver, scheduler = explicit(name)
    scheduler.set_timesteps(sigmas=np.array(sigmas))
    scheduler.set_begin_index(0)
    schedule = explicit_levels(sigmas)
    start = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    keys = jnp.asarray(step_keys([7]))
    table, step = jax.tree.map(np.float32, solver.table(schedule)), jax.jit(solver.step)
    state, expected, worst = solver.init(jnp.asarray(start), keys), start, 0.0
    for i, t in enumerate(scheduler.timesteps):
        assert 0 <= schedule.timesteps[i] - float(t) <= (1 if name == "unipc" else 1e-4)  # UniPC has integers
        ours = velocity(np.asarray(state.x), float(schedule.timesteps[i]), start)
        theirs = velocity(expected, float(schedule.timesteps[i]), start).astype(np.float32)
        state = step(state, jax.tree.map(lambda a, i=i: a[i], table), jnp.asarray(ours, jnp.float32))
        fresh = torch.from_numpy(np.array(step_noise(keys, jnp.int32(i), SHAPE[1:])))
        with mock.patch.object(scheduling_flow_match_lcm, "randn_tensor", lambda *a, noise=fresh, **k: noise):
            expected = scheduler.step(torch.from_numpy(theirs), t, torch.from_numpy(expected))[0].numpy()
        worst = max(worst, np.abs(np.asarray(state.x) - expected).max() / np.abs(expected).max())
    print(f"{name}, {len(sigmas)} levels from {sigmas[0]:g}: at most {worst:.1e}")
    assert worst < (2.5e-7 if name != "unipc" else 1e-4)  # whose log(1 - sigma) at 1 - 1e-6 is of fp32 there
