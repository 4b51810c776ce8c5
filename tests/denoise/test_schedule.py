"""Noise levels against those of the official code and of diffusers, and the schedules that cannot be."""

import numpy as np
import pytest
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanVideoToVideoPipeline,
)

from maxdiffusion.denoise.schedule import Schedule, dpm_flow, euler_flow, explicit_levels, levels_by_expert, unipc_flow
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


@pytest.mark.parametrize(("steps", "shift"), [(4, 5.0), (4, 16.0), (8, 5.0), (2, 1.0)])
def test_euler_has_the_levels_of_distilled_models(steps, shift):
    reference = FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    schedule = euler_flow(steps, shift, "official")
    np.testing.assert_allclose(schedule.sigmas, reference.sigmas.numpy(), rtol=2e-7)
    np.testing.assert_allclose(schedule.timesteps, reference.timesteps.numpy(), rtol=2e-7)
    if (steps, shift) == (4, 5.0):
        np.testing.assert_allclose(schedule.timesteps, [1000, 937.5, 833.3333, 625], rtol=1e-7)


def test_explicit_levels_are_taken_as_they_are():
    schedule = explicit_levels([1.0, 0.757, 0.522])
    np.testing.assert_array_equal(schedule.sigmas, np.float32([1, 0.757, 0.522, 0]))
    np.testing.assert_array_equal(schedule.timesteps, np.float32([1000, 757, 522]))


@pytest.mark.parametrize(
    ("sigmas", "sentence"),
    [
        ([0.5, 0.7], "sigmas must fall, but 0.5 is followed by 0.7"),
        ([1.0, 0.5, 0.5], "0.5 is followed by 0.5"),
        ([1.0, 0.5, 0.5 - 1e-9], "0.5 is followed by 0.5"),
        ([1.1, 0.5], "sigmas has the level 1.1"),
        ([1.0, 0.0], "sigmas has the level 0; levels lie above 0"),
        ([1.0, float("nan")], "sigmas has the level nan"),
    ],
)
def test_levels_that_cannot_be(sigmas, sentence):
    with pytest.raises(UserError, match=sentence):
        explicit_levels(sigmas)


def test_each_experts_levels_are_its_own_shifted_grid():
    """Ten steps of shift 12 down to the boundary, four of shift 5 from there, evenly spaced before the shift."""
    schedule = levels_by_expert((10, 4), (12.0, 5.0), 0.875)
    assert len(schedule) == 14 and schedule.sigmas[0] == 1 and schedule.sigmas[10] == np.float32(0.875)
    np.testing.assert_allclose(schedule.timesteps, 1000 * schedule.sigmas[:-1])
    for sigmas, shift in ((schedule.sigmas[:11], 12.0), (schedule.sigmas[10:], 5.0)):
        u = sigmas / (shift - (shift - 1) * sigmas.astype(np.float64))
        np.testing.assert_allclose(np.diff(u), (u[-1] - u[0]) / (len(u) - 1), rtol=1e-5)


def test_each_experts_levels_begin_and_end_as_one_grid_where_the_boundary_is_one_of_its_levels():
    """The boundary 0.625 of shift 5 is 0.25 before the shift: three and one steps are the four of the whole grid."""
    joined = levels_by_expert((3, 1), (5.0, 5.0), 0.625)
    np.testing.assert_allclose(joined.sigmas, euler_flow(4, 5.0, "official").sigmas, rtol=2e-7)


@pytest.mark.parametrize(("levels", "recipe"), [*REFERENCES, ("official", euler_flow)])
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
