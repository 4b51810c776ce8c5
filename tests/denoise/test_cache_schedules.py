"""The steps that static caches compute."""

import numpy as np
import pytest

from maxdiffusion.denoise import cache_schedules as schedules
from maxdiffusion.denoise.experts import ExpertSteps

ONE = (ExpertSteps(0, 50),)
TWO = (ExpertSteps(0, 26), ExpertSteps(26, 40, "transformer_2"))


def steps(compute):
    return np.flatnonzero(compute).tolist()


def test_taylor_seer_computes_three_steps_then_every_fifth():
    assert steps(schedules.taylor(ONE, 3, 4)) == [0, 1, 2, *range(4, 50, 5)]
    assert steps(schedules.taylor(TWO, 3, 4)) == [0, 1, 2, 4, 9, 14, 19, 24, 26, 27, 28, 30, 35]


def test_spectrum_computes_five_steps_then_one_of_a_growing_window():
    published = [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]
    for count in (50, 40, 20):
        found = steps(schedules.spectrum((ExpertSteps(0, count),), 5))
        assert found == [step for step in published if step < count]
    high = [step for step in published if step < 26]
    assert steps(schedules.spectrum(TWO, 5)) == [*high, *(26 + step for step in published if step < 14)]
    assert steps(schedules.spectrum(ONE, 3, 3))[:8] == [0, 1, 2, 4, 6, 9, 13, 17]


@pytest.mark.parametrize("kind", schedules.PUBLISHED)
def test_published_ratios_leave_steps_out_after_the_first(kind):
    found = schedules.PUBLISHED[kind]
    count = len(found.ratios)
    assert count in (40, 50) and found.ratios[0] == 1
    first = schedules.first_steps((ExpertSteps(0, count),), [10])
    compute = schedules.mag(first, (ExpertSteps(0, count),), found.ratios, found.threshold, found.max_skips)
    assert all(compute[:10]) and 10 < sum(compute) < count
    gaps = np.diff(steps(compute))
    assert gaps.max() <= found.max_skips + 1


def test_no_threshold_computes_every_step_and_each_expert_its_first():
    first = schedules.first_steps(TWO, [0, 0])
    ratios = [0.99] * 40
    assert all(schedules.mag(first, TWO, ratios, 0.0, 9))
    compute = schedules.mag(first, TWO, [1.0] * 40, 1.0, 100)
    assert steps(compute) == [0, 26]


def test_the_nearest_ratios_of_another_number_of_steps_keep_both_ends():
    ratios = np.linspace(1, 0.5, 50).tolist()
    found = schedules.nearest(ratios, 20)
    assert len(found) == 20 and found[0] == 1 and found[-1] == 0.5 and np.all(np.diff(found) < 0)
    np.testing.assert_allclose(schedules.nearest(ratios, 50), ratios, rtol=1e-6)
