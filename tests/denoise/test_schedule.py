"""Noise levels against those of the official code and of diffusers, and the schedules that cannot be."""

import numpy as np
import pytest
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanVideoToVideoPipeline,
)

from maxdiffusion.denoise.schedule import Schedule, dpm_flow, euler_flow, unipc_flow
from maxdiffusion.errors import UserError
from tests.support import official

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def diffusers(scheduler):
    def levels(steps, shift):
        made = scheduler(shift)
        made.set_timesteps(steps)
        return made

    return levels


REFERENCES = {
    ("official", unipc_flow): lambda steps, shift: official.scheduler("unipc", steps, shift),
    ("official", dpm_flow): lambda steps, shift: official.scheduler("dpm++", steps, shift),
    ("diffusers", unipc_flow): diffusers(lambda shift: UniPCMultistepScheduler(flow_shift=shift, **FLOW)),
    ("diffusers", dpm_flow): diffusers(lambda shift: DPMSolverMultistepScheduler(flow_shift=shift, **FLOW)),
    ("diffusers", euler_flow): diffusers(lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift)),
}


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0, 16.0, 0.7])
@pytest.mark.parametrize(("levels", "recipe"), REFERENCES)
def test_equals_reference(levels, recipe, shift):
    for steps in range(1, 101):
        reference = REFERENCES[levels, recipe](steps, shift)
        schedule = recipe(steps, shift, levels)
        # One fp32 rounding apart at most: the Euler reference rounds its range to fp32 first.
        np.testing.assert_allclose(schedule.sigmas, reference.sigmas.numpy(), rtol=2e-7, err_msg=f"{steps} steps")
        if recipe is euler_flow:
            np.testing.assert_allclose(schedule.timesteps, reference.timesteps.numpy(), rtol=2e-7)
        else:  # truncated to integers: a rounding error would show as a whole step
            np.testing.assert_array_equal(schedule.timesteps, reference.timesteps.numpy(), err_msg=f"{steps} steps")


def test_euler_has_no_official_levels():
    np.testing.assert_array_equal(euler_flow(9, 3.0, "official").sigmas, euler_flow(9, 3.0, "diffusers").sigmas)


@pytest.mark.parametrize(("levels", "recipe"), REFERENCES)
@pytest.mark.parametrize(
    ("steps", "shift"), [(0, 5.0), (-3, 5.0), (10, 0.0), (10, -1.0), (10, float("nan")), (50, 1e8)]
)
def test_impossible(levels, recipe, steps, shift):
    with pytest.raises(UserError, match=r"num_inference_steps|flow_shift"):
        recipe(steps, shift, levels)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="N\\+1 sigmas"):
        Schedule(np.array([1.0, 0.5, 0.0]), np.array([999.0]))


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.8, 0.99, 1.0])
def test_the_last_steps_are_those_of_the_reference(strength):
    reference = UniPCMultistepScheduler(flow_shift=5.0, **FLOW)
    pipeline = WanVideoToVideoPipeline(None, None, None, None, reference)
    reference.set_timesteps(20)
    timesteps, count = pipeline.get_timesteps(20, reference.timesteps, strength, "cpu")
    schedule = unipc_flow(20, 5.0, "diffusers").last(strength)
    assert len(schedule) == count
    np.testing.assert_array_equal(schedule.timesteps, timesteps.numpy())
    assert schedule.sigmas[-1] == 0
    assert len(schedule.sigmas) == count + 1


@pytest.mark.parametrize(("levels", "recipe"), REFERENCES)
def test_the_last_steps_start_at_their_own_level(levels, recipe):
    whole, last = recipe(20, 5.0, levels), recipe(20, 5.0, levels).last(0.3)
    np.testing.assert_array_equal(last.sigmas, whole.sigmas[14:])
    np.testing.assert_array_equal(last.timesteps, whole.timesteps[14:])


def test_a_strength_that_leaves_no_step_names_one_that_does():
    schedule = unipc_flow(3, 5.0)
    with pytest.raises(UserError, match=r"at least 0\.334"):
        schedule.last(0.3)
    assert len(schedule.last(0.334)) == 1
