"""The look of a clip in figures."""

import numpy as np
import pytest

from maxdiffusion.media import drift


def clip(seed=0, offset=0, blur=False):
    frames = np.random.default_rng(seed).integers(40, 200, (2, 24, 32, 3))
    if blur:
        frames = (frames + np.roll(frames, 1, axis=2)) // 2
    return (frames + offset).astype(np.uint8)


def test_a_brighter_clip_has_larger_means_and_the_same_sharpness():
    a, b = drift.look(clip()), drift.look(clip(offset=10))
    np.testing.assert_allclose(np.subtract(b, a), [10, 10, 10, 0, 0], atol=1e-2)


def test_blur_lowers_sharpness_and_keeps_the_colour():
    a, b = drift.look(clip()), drift.look(clip(blur=True))
    assert b.sharpness < 0.6 * a.sharpness
    np.testing.assert_allclose(b[:3], a[:3], atol=1)


def test_sharpness_is_the_variance_of_the_laplacian():
    frame = np.zeros((1, 5, 5, 3), np.uint8)
    frame[0, 2, 2] = 100
    laplacian = np.zeros((3, 3))
    laplacian[1, 1], laplacian[[0, 1, 1, 2], [1, 0, 2, 1]] = -400, 100
    assert drift.look(frame).sharpness == pytest.approx(laplacian.var(), rel=1e-5)


def test_the_report_is_relative_to_the_first_clip(caplog):
    with caplog.at_level("INFO", "maxdiffusion"):
        drift.report([drift.look(clip()), drift.look(clip(offset=10))])
    assert "clip 2: red +10.0, green +10.0, blue +10.0, contrast" in caplog.text
