"""The segments of a long video, and their padding, against diffusers' WanAnimatePipeline."""

import diffusers
import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.request import Segments


@pytest.mark.parametrize(("frames", "length", "carried"), [(17, 9, 1), (13, 9, 1), (22, 17, 5), (9, 9, 1), (2, 9, 1)])
def test_parts_and_their_padding_match_the_reference(frames, length, carried):
    cut = Segments(frames, length, carried)
    end = cut.starts[-1] + length
    assert end >= frames
    padded = diffusers.WanAnimatePipeline.pad_video_frames(None, list(range(frames)), end)
    for start in cut.starts:
        assert cut.frames_of(start) == padded[start : start + length]


def test_all_at_once_is_one_part():
    assert Segments(81, 81).starts == (0,)
    assert Segments(1, 1).frames_of(0) == [0]


def test_parts_without_anything_new_are_refused():
    with pytest.raises(UserError, match="leaves nothing new"):
        Segments(77, 5, 5)
