import collections
import itertools

import numpy as np
import pytest

from tests.support.tiny_wan import data

ATTRIBUTES = ("colour", "shape", "direction", "background")


def test_one_combination_in_eight_is_held_out_and_every_pair_is_seen():
    assert len(data.combinations()) == 240
    assert len(data.held_out_combinations()) == 30
    training = data.training_combinations()
    for first, second in itertools.combinations(ATTRIBUTES, 2):
        pairs = [collections.Counter((getattr(c, first), getattr(c, second)) for c in part)
                 for part in (training, data.combinations())]  # fmt: skip
        assert min(pairs[0][key] / pairs[1][key] for key in pairs[1]) >= 0.75


def test_the_taught_words_are_held_out_too_and_every_pair_with_a_known_word_is_seen():
    taught = data.taught_combinations()
    held_out = collections.Counter((c.colour == "purple", c.shape == "rectangle") for c in taught if c.held_out)
    assert held_out == {(True, False): 12, (False, True): 20, (True, True): 16}
    seen = [c for c in taught if not c.held_out]
    for first, second in itertools.combinations(ATTRIBUTES, 2):
        pairs = {(getattr(c, first), getattr(c, second)) for c in seen}
        assert {(getattr(c, first), getattr(c, second)) for c in taught} - pairs <= {("purple", "rectangle")}
    assert not set(taught) & set(data.combinations())


def test_prompts_round_trip():
    for combination in data.combinations():
        assert data.parse_prompt(combination.prompt) == combination


def test_measurements_are_right_on_rendered_clips():
    rng = np.random.default_rng(0)
    for combination in [*data.held_out_combinations()[::2], *data.taught_combinations()[::6]]:
        measured = data.measure(data.render_uint8(data.sample_clip(combination, rng)))
        assert all(measured.correct(combination).values()), (combination, measured)
        assert measured.track_residual < 0.5
        assert measured.area_jitter < 0.08  # a flat rectangle that moves up gains or loses a whole row
        assert measured.visible == 1


def test_measurements_stay_right_with_noise_and_blur():
    rng = np.random.default_rng(1)
    for combination in data.held_out_combinations()[::6]:
        frames = data.render(data.sample_clip(combination, rng))
        blurred = (frames + np.roll(frames, 1, 1) + np.roll(frames, 1, 2) + np.roll(frames, -1, 1)) / 4
        noisy = np.clip(blurred + rng.normal(0, 4, frames.shape), 0, 255).astype(np.uint8)
        assert all(data.measure(noisy).correct(combination).values()), combination


def test_jitter_is_noticed():
    rng = np.random.default_rng(2)
    clip = data.sample_clip(data.Combination("red", "circle", "left", "gray"), rng)
    frames = data.render_uint8(clip)
    shaken = np.stack([np.roll(frame, (-1) ** i * 3, axis=0) for i, frame in enumerate(frames)])
    assert data.measure(shaken).track_residual > 5 * data.measure(frames).track_residual


@pytest.mark.parametrize("value", [0, 128])
def test_nothing_visible_gives_none(value):
    measured = data.measure(np.full((17, 96, 96, 3), value, np.uint8))
    assert (measured.colour, measured.shape, measured.direction, measured.visible) == ("none", "none", "none", 0)


@pytest.mark.parametrize("shape", data.ALL_SHAPES)
def test_shapes_stay_inside_and_windows_equal_the_whole(shape):
    rng = np.random.default_rng(3)
    for direction in data.DIRECTIONS:
        clip = data.sample_clip(data.Combination("white", shape, direction, "black"), rng)
        frames = data.render_uint8(clip)
        background = np.asarray(data.BACKGROUNDS["black"])
        assert (frames[:, 0] == background).all() and (frames[:, -1] == background).all()
        assert (frames[:, :, 0] == background).all() and (frames[:, :, -1] == background).all()
        window = data.render_uint8(clip, window=(8, 16, 40, 32), first=3, frames=5)
        assert (window == frames[3:8, 8:48, 16:48]).all()


def test_a_still_moves_in_every_direction_that_its_prompt_names_and_keeps_to_its_image():
    rng = np.random.default_rng(4)
    for shape in data.SHAPES:
        still = data.sample_movable(shape, *data.random_colours(rng), rng)
        for direction in data.DIRECTIONS:
            combination = data.Combination("", shape, direction, "")
            assert direction in data.image_prompt(combination, rng)
            frames = data.render_uint8(data.move(still, direction, rng))
            assert data.measure(frames).direction == direction
            kept = data.compare(frames, still)
            assert kept.shape_kept and kept.first_psnr > 100 and max(kept.colour_error, kept.background_error) < 0.6
            tinted = data.compare(255 - frames, still)
            assert tinted.first_psnr < 20 and tinted.colour_error > 5


def test_the_frames_edge_stops_a_still():
    still = data.Clip("circle", (255, 255, 255), (0, 0, 0), 12.0, ((20.0, 48.0),) * data.FRAMES)
    moves = {direction: data.move(still, direction, np.random.default_rng(5)) for direction in data.DIRECTIONS}
    assert moves["left"] is None and all(moves[direction] for direction in ("right", "up", "down"))
