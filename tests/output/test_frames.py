"""Frames that are written as they are decoded, and found again by the run that goes on."""

import os

import numpy as np
import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.media.read import read_video
from maxdiffusion.output.frames import Frames
from tests.support.media import read_metadata

LATENTS = np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)


def frames(folder, latents=LATENTS, identity="one"):
    return Frames(folder / "a", latents, identity, {"seed": "7"})


def test_a_later_run_goes_on_from_the_first_frame_that_is_absent(tmp_path):
    first = frames(tmp_path)
    assert not first.there
    first.add(0, PIXELS[:1])
    first.add(1, PIXELS[1:3])
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(".a.")
    second = frames(tmp_path)
    np.testing.assert_array_equal(np.stack(second.there), PIXELS[:3])
    with second.writing(tmp_path / "a", False) as write:
        write(iter([PIXELS[:2], PIXELS[2:]]))  # the second is there in part
    assert os.listdir(tmp_path) == ["a"]
    np.testing.assert_array_equal(read_video(tmp_path / "a"), PIXELS)
    assert read_metadata(tmp_path / "a" / "0000.png") == {"seed": "7"}


def test_frames_of_other_latents_or_another_run_are_not_taken(tmp_path):
    frames(tmp_path).add(0, PIXELS)
    assert len(frames(tmp_path).there) == 5
    assert not frames(tmp_path, LATENTS + 1).there and not frames(tmp_path, identity="other").there


def test_a_damaged_frame_is_written_again(tmp_path):
    frames(tmp_path).add(0, PIXELS)
    (folder,) = tmp_path.iterdir()
    path = folder / "0002.png"
    path.write_bytes(path.read_bytes()[:100])
    again = frames(tmp_path)
    assert len(again.there) == 2
    again.add(2, PIXELS[2:])
    assert len(frames(tmp_path).there) == 5


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "diary.txt").touch()
    made = frames(tmp_path)
    made.add(0, PIXELS)
    with pytest.raises(UserError, match="holds other things than frames"):
        made.publish(tmp_path / "a", True)
