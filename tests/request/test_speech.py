"""What follows from the image and the sound of S2V when it is not given."""

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import request
from maxdiffusion.errors import UserError
from tests.support import sounds


@pytest.fixture
def load(tmp_path, monkeypatch):
    """The run of S2V with an image of 200 x 100 pixels and a sound of 5.1 s."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Image.new("RGB", (200, 100)).save("a.png")
    sounds.tone(tmp_path / "a.wav", seconds=5.1)
    (tmp_path / "page.yml").write_text("model_name: wan2.2-s2v-14b\nprompt: a cat\nimage: a.png\n")
    return lambda *more: request.load(["page.yml", *more])


def test_the_video_is_as_long_as_the_sound(load):
    """81 frames at 16 per second, of which the first 3 are dropped; each clip has a seed of its own."""
    job = load("audio=a.wav", "seed=7")
    assert (job.cfg.num_frames, job.segments.starts, job.segments.dropped) == (78, (0, 80), 3)
    assert [job.seed(job.videos[0], clip) for clip in (0, 1)] == [7, 8]
    assert (job.cfg.width, job.cfg.height) == (256, 128)  # each side up to a multiple of 64
    assert load("audio=a.wav", "fps=24").cfg.num_frames == 119
    assert len(load("audio=a.wav", "num_frames=77").segments) == 1


def test_ten_minutes_are_too_long_and_give_their_beginning(load, tmp_path):
    sounds.write(tmp_path / "long.wav", np.zeros(600 * 8000), 8000)
    with pytest.raises(
        UserError, match="fills 9597 frames at fps=16, and a video has at most 4093; write num_frames=4093"
    ):
        load("audio=long.wav")
    assert load("audio=long.wav", "num_frames=4093").cfg.num_frames == 4093


def test_a_sound_that_fills_no_frame_is_refused(load, tmp_path):
    sounds.tone(tmp_path / "short.wav", seconds=0.2)
    with pytest.raises(
        UserError, match=r"audio=short\.wav lasts 0\.2 s, which fills no frame after the first 3 at fps=16"
    ):
        load("audio=short.wav")
