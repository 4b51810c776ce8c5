import numpy as np
import pytest

from maxdiffusion.media.contact_sheet import SIDE, contact_sheet


@pytest.mark.parametrize(
    ("frames", "count", "chosen"),
    [
        (17, 6, [0, 3, 6, 10, 13, 16]),
        (81, 5, [0, 20, 40, 60, 80]),
        (5, 6, [0, 1, 2, 3, 4]),
        (5, 2, [0, 4]),
        (5, 1, [0]),
        (1, 6, [0]),
    ],
)
def test_the_chosen_frames_are_evenly_spaced_with_the_first_and_the_last(frames, count, chosen):
    video = np.random.default_rng(0).integers(0, 256, (frames, 8, 12, 3), np.uint8)
    np.testing.assert_array_equal(contact_sheet(video, count), np.concatenate([video[i] for i in chosen], axis=1))


@pytest.mark.parametrize(
    ("height", "width", "small"),
    [
        (480, 832, (184, 320)),
        (832, 480, (320, 185)),
        (720, 1280, (180, 320)),
        (96, 64, (96, 64)),
        (320, 320, (320, 320)),
    ],
)
def test_frames_are_made_small_and_never_large_and_keep_their_proportions(height, width, small):
    sheet = contact_sheet(np.zeros((2, height, width, 3), np.uint8), 2)
    assert sheet.shape == (small[0], 2 * small[1], 3)
    assert max(small) <= SIDE and small[1] / small[0] >= width / height
