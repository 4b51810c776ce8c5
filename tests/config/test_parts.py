"""The parts of a long video, and their padding, against diffusers' WanAnimatePipeline."""

import diffusers
import pytest

from maxdiffusion.config.parts import Parts
from maxdiffusion.errors import UserError


@pytest.mark.parametrize(("frames", "length", "carried"), [(17, 9, 1), (13, 9, 1), (22, 17, 5), (9, 9, 1), (2, 9, 1)])
def test_parts_and_their_padding_match_the_reference(frames, length, carried):
    parts = Parts(frames, length, carried)
    end = parts.starts[-1] + length
    assert end >= frames
    padded = diffusers.WanAnimatePipeline.pad_video_frames(None, list(range(frames)), end)
    for start in parts.starts:
        assert parts.of(start) == padded[start : start + length]


def test_all_at_once_is_one_part():
    assert Parts(81, 81).starts == (0,)
    assert Parts(1, 1).of(0) == [0]


def test_parts_without_anything_new_are_refused():
    with pytest.raises(UserError, match="leaves nothing new"):
        Parts(77, 5, 5)
