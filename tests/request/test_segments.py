"""The segments of a long video, and their padding, against diffusers' WanAnimatePipeline."""

import diffusers
import numpy as np
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


@pytest.mark.parametrize("there", [0, 4, 9, 12, 17])
def test_segments_whose_frames_are_there_are_not_decoded(there):
    """Two segments of 9 frames, 3 latent ones each, that share a frame; the frames' values are their numbers."""
    cut, decoded = Segments(17, 9, 1), []

    def decode(latents):
        (start,) = set(latents[0].tolist())
        decoded.append(start)
        frames = np.arange(start, start + 9)[None]
        yield from (frames[:, :1], frames[:, 1:5], frames[:, 5:])

    latents = np.array([[0, 0, 0, 8, 8, 8]])
    parts = list(cut.decode(decode, latents, there))
    assert [frame for part in parts for frame in part[0]] == list(range(there, 17))
    assert decoded == [start for start in (0, 8) if start + 9 > there]


@pytest.mark.parametrize("there", [0, 4, 7, 13])
def test_segments_that_are_decoded_one_after_another_are_all_decoded(there):
    """Two segments of 8 frames, 2 latent ones each, of which the first 3 frames are dropped."""
    cut, decoded = Segments(13, 8, dropped=3), []
    assert cut.starts == (0, 8) and len(Segments(5, 8, dropped=3)) == 1 and len(Segments(6, 8, dropped=3)) == 2

    def decode(latents):
        (start,) = set(latents[0].tolist())
        decoded.append(start)
        frames = np.arange(start, start + 8)[None]
        yield from (frames[:, :4], frames[:, 4:])

    parts = list(cut.decode(decode, np.array([[0, 0, 8, 8]]), there))
    assert [frame for part in parts for frame in part[0]] == list(range(there + 3, 16))
    assert decoded == [0, 8]
