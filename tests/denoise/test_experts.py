"""Which expert takes which steps, and which are guided."""

import subprocess
import sys

import numpy as np
import pytest

from maxdiffusion.denoise.experts import ExpertSteps, described, expert_steps, guided, program_calls
from maxdiffusion.denoise.solvers import UniPC


@pytest.mark.parametrize(
    ("levels", "steps", "shift", "boundary", "high"),
    [
        ("official", 40, 12.0, 0.875, 26),  # A14B's own, from text
        ("official", 40, 5.0, 0.9, 15),  # and from an image
        ("diffusers", 40, 12.0, 0.875, 26),
        ("diffusers", 40, 5.0, 0.9, 15),
        ("official", 20, 3.0, 0.875, 6),  # here the levels of the two decide
        ("diffusers", 20, 3.0, 0.875, 7),
    ],
)
def test_steps_of_the_experts(levels, steps, shift, boundary, high):
    """The figures are those of the schedulers of either reference."""
    found = expert_steps(UniPC().schedule(steps, shift, levels).timesteps, boundary, 4.0, 3.0)
    assert [expert[:2] for expert in found] == [(0, high), (high, steps)]


def test_experts_without_steps_are_not_named():
    timesteps = np.array([999.0, 900.0, 500.0], np.float32)
    assert expert_steps(timesteps, 0.9, 2.0, 3.0) == (
        ExpertSteps(0, 2, "transformer", 2.0),
        ExpertSteps(2, 3, "transformer_2", 3.0),
    )
    assert expert_steps(timesteps, 0.4, 2.0, 3.0) == (ExpertSteps(0, 3, "transformer", 2.0),)
    assert expert_steps(timesteps, None, 2.0, None) == (ExpertSteps(0, 3, "transformer", 2.0),)


@pytest.mark.parametrize(("first", "want"), [(2, ((0, 2), (2, 3))), (0, ((0, 3),)), (3, ((0, 3),)), (9, ((0, 3),))])
def test_steps_by_number(first, want):
    """In place of the boundary; both ends leave an expert out."""
    found = expert_steps(np.array([999.0, 900.0, 500.0], np.float32), None, 2.0, 3.0, first)
    assert tuple(expert[:2] for expert in found) == want
    assert found[0].net == ("transformer" if first else "transformer_2")


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ((None, 5.0, None), (True,)),
        ((None, 1.0, None), (False,)),
        ((0.875, 3.5, 1.0), (True, False)),
        ((0.875, 1.0, 3.0), (False, True)),
        ((0.875, 1.0, 1.0), (False, False)),
        ((0.0, 1.0, 3.0), (False,)),
    ],
)
def test_which_experts_are_guided_is_known_without_a_schedule(keys, want):
    assert guided(*keys) == want
    assert tuple(expert.guided for expert in expert_steps(UniPC().schedule(10, 5.0).timesteps, *keys)) == want


def test_calls_of_each_program():
    both = ExpertSteps(0, 3, guidance_scale=3.0), ExpertSteps(3, 7)
    assert program_calls(both, steps=1) == {(True, 1): 3, (False, 1): 4}
    assert program_calls(both, steps=100) == {(True, 3): 1, (False, 4): 1}
    same = ExpertSteps(0, 3, guidance_scale=3.0), ExpertSteps(3, 6, guidance_scale=2.0)
    assert program_calls(same, steps=1) == {(True, 1): 6} and program_calls(same, steps=100) == {(True, 3): 2}


def test_steps_and_passes_in_words():
    both = ExpertSteps(0, 10, guidance_scale=3.5), ExpertSteps(10, 14, "transformer_2")
    assert described(both) == "14 steps: 10 of transformer with guidance (20 passes), 4 of transformer_2 (4 passes)"
    assert described(both, [5, 4]) == (
        "14 steps, 9 computed: 5 of transformer with guidance (10 passes), 4 of transformer_2 (4 passes)"
    )
    assert described(both[:1]) == "10 steps: 10 of transformer with guidance (20 passes)"


def test_needs_no_jax():
    code = "import sys, maxdiffusion.denoise.experts\nassert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
