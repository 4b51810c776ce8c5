"""Noise: from the seed alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxdiffusion.denoise.noise import noise, step_keys, step_noise
from maxdiffusion.errors import UserError

SHAPE = (3, 8, 8, 16)


def test_each_example_is_its_seed_s_own():
    both = np.asarray(noise([7, 42], SHAPE))
    assert both.shape == (2, *SHAPE) and both.dtype == np.float32
    np.testing.assert_array_equal(both[0], noise([7], SHAPE)[0])
    np.testing.assert_array_equal(both[1], noise([42], SHAPE)[0])
    np.testing.assert_array_equal(noise([42, 7, 42], SHAPE)[2], both[1])
    assert np.abs(both[0] - both[1]).max() > 1


def test_is_standard_normal():
    x = np.asarray(noise([0], (5, 16, 16, 16)))
    assert abs(x.mean()) < 0.03 and abs(x.std() - 1) < 0.03


def test_equals_the_library_s_key_for_small_seeds():
    np.testing.assert_array_equal(noise([5], SHAPE)[0], jax.random.normal(jax.random.key(5), SHAPE))


def test_large_seeds_lose_nothing():
    a, b = np.asarray(noise([5, 2**32 + 5], SHAPE))
    assert np.abs(a - b).max() > 1
    noise([2**64 - 1], SHAPE)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_out_of_range(seed):
    with pytest.raises(UserError, match=f"seed={seed}"):
        noise([3, seed], SHAPE)


def test_the_noise_of_a_step_is_of_its_seed_segment_and_number():
    def drawn(seeds, step, segment=0):
        return np.asarray(step_noise(jnp.asarray(step_keys(seeds, segment)), jnp.int32(step), SHAPE))

    both = drawn([7, 42], 3)
    assert both.shape == (2, *SHAPE) and abs(both.mean()) < 0.03 and abs(both.std() - 1) < 0.03
    np.testing.assert_array_equal(drawn([42], 3)[0], both[1])
    others = [
        drawn([7], 4)[0],
        drawn([7], 3, 1)[0],
        drawn([2**32 + 7], 3)[0],
        both[1],
        np.asarray(noise([7], SHAPE))[0],
    ]
    for other in others:
        assert abs(np.corrcoef(other.ravel(), both[0].ravel())[0, 1]) < 0.1
