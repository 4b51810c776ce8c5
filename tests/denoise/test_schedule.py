"""The recipes against the three references, and the schedules that cannot be."""

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

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
REFERENCES = {
    unipc_flow: lambda shift: UniPCMultistepScheduler(flow_shift=shift, **FLOW),
    dpm_flow: lambda shift: DPMSolverMultistepScheduler(flow_shift=shift, **FLOW),
    euler_flow: lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
}


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0, 16.0, 0.7])
@pytest.mark.parametrize("recipe", REFERENCES)
def test_equals_reference(recipe, shift):
    reference = REFERENCES[recipe](shift)
    for steps in range(1, 101):
        reference.set_timesteps(steps)
        schedule = recipe(steps, shift)
        # One fp32 rounding apart at most: the Euler reference rounds its range to fp32 first.
        np.testing.assert_allclose(schedule.sigmas, reference.sigmas.numpy(), rtol=2e-7, err_msg=f"{steps} steps")
        if recipe is euler_flow:
            np.testing.assert_allclose(schedule.timesteps, reference.timesteps.numpy(), rtol=2e-7)
        else:  # truncated to integers: a rounding error would show as a whole step
            np.testing.assert_array_equal(schedule.timesteps, reference.timesteps.numpy(), err_msg=f"{steps} steps")


@pytest.mark.parametrize("recipe", REFERENCES)
@pytest.mark.parametrize(
    ("steps", "shift"), [(0, 5.0), (-3, 5.0), (10, 0.0), (10, -1.0), (10, float("nan")), (50, 1e8)]
)
def test_impossible(recipe, steps, shift):
    with pytest.raises(UserError, match=r"num_inference_steps|flow_shift"):
        recipe(steps, shift)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="N\\+1 sigmas"):
        Schedule(np.array([1.0, 0.5, 0.0]), np.array([999.0]))


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.8, 0.99, 1.0])
def test_the_last_steps_are_those_of_the_reference(strength):
    reference = UniPCMultistepScheduler(flow_shift=5.0, **FLOW)
    pipeline = WanVideoToVideoPipeline(None, None, None, None, reference)
    reference.set_timesteps(20)
    timesteps, count = pipeline.get_timesteps(20, reference.timesteps, strength, "cpu")
    schedule = unipc_flow(20, 5.0).last(strength)
    assert len(schedule) == count
    np.testing.assert_array_equal(schedule.timesteps, timesteps.numpy())
    assert schedule.sigmas[-1] == 0
    assert len(schedule.sigmas) == count + 1


def test_a_strength_that_leaves_no_step_names_one_that_does():
    schedule = unipc_flow(3, 5.0)
    with pytest.raises(UserError, match=r"at least 0\.334"):
        schedule.last(0.3)
    assert len(schedule.last(0.334)) == 1
