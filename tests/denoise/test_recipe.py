"""The recipe of a run from its keys: levels, and the steps of each expert."""

import numpy as np

from maxdiffusion.denoise.recipe import Recipe

SCALES = (3.5, 1.0)


def parts(recipe):
    return [(expert.net, expert.start, expert.stop, expert.guided) for expert in recipe.experts]


def test_four_steps_split_by_number_and_by_ratio_alike():
    """A14B distilled to four steps: the boundaries of both tasks lie between the second and the third level."""
    words = ("euler", (4, None), (5.0, None))
    expected = [("transformer", 0, 2, True), ("transformer_2", 2, 4, False)]
    for keys in ({"boundary": 0.875}, {"boundary": 0.9}, {"boundary": None, "boundary_step": 2}):
        recipe = Recipe.of(*words, scales=SCALES, **keys)
        assert parts(recipe) == expected
        np.testing.assert_allclose(recipe.schedule.timesteps, [1000, 937.5, 833.33333, 625])
    shifted = Recipe.of("euler", (4, None), (16.0, None), scales=SCALES, boundary=0.9)
    assert parts(shifted)[0][2] == 3  # of a first and a last frame, where the number of steps is needed
    np.testing.assert_allclose(shifted.schedule.sigmas, [1, 0.97959, 0.94118, 0.84211, 0], rtol=1e-5)


def test_steps_of_each_expert():
    """The high-noise expert guided in ten steps, the distilled one in four."""
    recipe = Recipe.of("unipc", (10, 4), (12.0, 5.0), scales=SCALES, boundary=0.875)
    assert parts(recipe) == [("transformer", 0, 10, True), ("transformer_2", 10, 14, False)]
    assert recipe.schedule.sigmas[10] == np.float32(0.875)


def test_strength_leaves_the_last_steps_of_either_expert():
    words = ("unipc", (10, 4), (12.0, 5.0))
    assert parts(Recipe.of(*words, scales=SCALES, boundary=0.875, strength=0.5)) == [
        ("transformer", 0, 3, True),
        ("transformer_2", 3, 7, False),
    ]
    assert parts(Recipe.of(*words, scales=SCALES, boundary=0.875, strength=0.25)) == [("transformer_2", 0, 3, False)]
    keys = {"scales": SCALES, "boundary": None, "boundary_step": 3, "strength": 0.5}
    assert parts(Recipe.of("euler", (4, None), (5.0, None), **keys))[0] == ("transformer", 0, 1, True)


def test_the_noise_is_of_the_first_explicit_level():
    keys = {"scales": (1.0, None), "boundary": None}
    assert Recipe.of("renoise", (2, None), (1.0, None), sigmas=(0.75, 0.5), **keys).noise_scale == 0.75
    assert Recipe.of("unipc", (2, None), (5.0, None), **keys).noise_scale == 1
