"""What follows from the videos of Animate and VACE when it is not given."""

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import request
from maxdiffusion.errors import UserError
from maxdiffusion.media.write import write

PROMPT = "视频中的人在做动作"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No hub is asked what some/where is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def animate(tmp_path, monkeypatch):
    """The run of Animate with a pose of 12 frames, 100 wide x 84 high, at 24 per second."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("pose.mp4", (84, 100)), ("face.mp4", (64, 64)), ("folder", (84, 100))):
        fmt = "mp4" if "." in name else "png"
        write(np.zeros((12 if fmt == "mp4" else 14, *size, 3), np.uint8), tmp_path / name, 24, fmt, {})
    Image.new("RGB", (40, 40)).save("a.png")
    (tmp_path / "page.yml").write_text("model_name: wan2.2-animate\npretrained_model_name_or_path: some/where\n")
    words = ["page.yml", "image=a.png", "face_video=face.mp4"]
    return lambda *more: request.load([*words, *("pose_video=pose.mp4",) * ("pose_video" not in str(more)), *more]).cfg


@pytest.mark.parametrize("conventions", ["official", "diffusers"])
def test_animate_is_as_long_as_the_pose(animate, conventions):
    """12 frames at 24 per second are half a second, 15 frames at 30; a folder has no times."""
    given = f"conventions={conventions}"
    assert animate(given).num_frames == 15
    assert animate(given, "fps=24").num_frames == animate(given, "input_frames=every").num_frames == 12
    assert animate(given, "pose_video=folder").num_frames == 14
    assert animate(given, "num_frames=9").num_frames == 9
    assert animate(given, "pose_video=a.png").num_frames == 77
    assert "num_frames: 15  (the length of pose_video pose.mp4)" in animate(given).describe()


def test_animate_is_as_large_as_the_pose(animate):
    def size(*words):
        cfg = animate(*words)
        return cfg.width, cfg.height

    assert size() == (96, 80)
    assert size("size=64*48") == (64, 48)
    assert size("conventions=diffusers") == (1040, 880)  # the variant's area


@pytest.mark.parametrize("conventions", ["official", "diffusers"])
def test_animate_needs_no_prompt(animate, conventions):
    cfg = animate(f"conventions={conventions}")
    assert cfg.prompt == (PROMPT,)
    assert f"prompt: {PROMPT}  (variant wan2.2-animate)" in cfg.describe()
    assert animate("prompt=a cat").prompt == ("a cat",)


def test_the_conventions_decide_which_frames_of_a_long_video_vace_sees(animate):
    def frames(*words):
        page = ["page.yml", "model_name=wan2.1-vace", "prompt=a cat", *words]
        return request.load(page).cfg.input_frames

    assert frames("video=pose.mp4", "num_frames=9") == "spread"
    assert frames("video=pose.mp4", "num_frames=9", "input_frames=timed") == "timed"
    assert frames("video=pose.mp4", "num_frames=9", "conventions=diffusers") == "timed"
    assert frames() == "timed"
    with pytest.raises(UserError, match="input_frames is only used with an input video"):
        frames("input_frames=spread")


def test_an_area_is_not_more_than_vace_s_video(animate):
    def size(*words):
        cfg = request.load(["page.yml", "model_name=wan2.1-vace", "prompt=a cat", *words]).cfg
        return cfg.width, cfg.height

    assert size("video=pose.mp4", "num_frames=9") == size("video=pose.mp4", "num_frames=9", "size=832*480") == (96, 80)
    assert size("video=pose.mp4", "num_frames=9", "size=48*64") == (64, 48)
    assert size("size=64*64") == (64, 64)
    assert size("video=pose.mp4", "num_frames=9", "width=64", "height=32") == (64, 32)
