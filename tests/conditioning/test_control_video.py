"""What is refused of the videos that a run is controlled by, before anything is loaded."""

import dataclasses
import logging

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import conditioning, request
from maxdiffusion.conditioning import control_video
from maxdiffusion.errors import UserError
from maxdiffusion.media.write import write


def clip(folder, name, frames, height, width, fmt="png"):
    path = folder / name
    write(np.full((frames, height, width, 3), 200, np.uint8), path, 12, fmt, {})
    return str(path)


def test_what_is_used_of_a_video_is_logged(tmp_path, caplog):
    path = clip(tmp_path, "clip.mp4", 12, 64, 96, "mp4")
    with caplog.at_level(logging.INFO, "maxdiffusion"):
        found = control_video.read("video", path, 9, 32, 48)
    assert found.shape == (10, 64, 96, 3)
    assert "video: the first 9 frames of 96 x 64 pixels at 12 per second, made 48 x 32" in caplog.text


@pytest.mark.parametrize(
    ("frames", "size", "like", "words"),
    [
        (7, (64, 96), None, "has 7 frames, and num_frames=9 are to be made; give a longer one, or write num_frames=5"),
        (
            9,
            (64, 64),
            None,
            "is 64 wide x 64 high, which 96 wide x 64 high would distort; crop it, or write size=64.64",
        ),
        (9, (64, 96), (9, 32, 48), "96 x 64 pixels and 9 frames, but video has 48 x 32 pixels and 9 frames"),
        (9, (64, 96), (10, 64, 96), "and 9 frames, but video has 96 x 64 pixels and more than 9 frames"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, frames, size, like, words):
    path = clip(tmp_path, "clip", frames, *size)
    other = None if like is None else ("video", np.zeros((*like, 3), np.uint8))
    with pytest.raises(UserError, match=words):
        control_video.read("mask", path, 9, 64, 96, other)


@pytest.mark.parametrize("size", [(64, 96), (70, 96), (48, 72), (1080, 1920)])
def test_sizes_that_differ_by_a_rounding_are_taken(tmp_path, size):
    height, width = (464, 832) if size[0] > 1000 else (64, 96)
    assert control_video.read("video", clip(tmp_path, "clip", 1, *size), 1, height, width).shape[1:3] == size


def test_a_mask_and_a_line_of_another_size_are_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "run.yml").write_text("model_name: wan2.1-vace-1.3b\nprompt: a cat\nsize: 96*64\nnum_frames: 5\n")
    video, mask = clip(tmp_path, "video", 5, 64, 96), clip(tmp_path, "mask", 5, 32, 48)
    job = request.load([str(tmp_path / "run.yml"), f"video={video}", f"mask={mask}"])
    with pytest.raises(UserError, match=r"mask=.* has 48 x 32 pixels and 5 frames, but video has 96 x 64"):
        conditioning.read(job)
    job = request.load([str(tmp_path / "run.yml"), f"video={video}"])
    assert len(conditioning.read(job).digest()) == 64
    others = [dataclasses.replace(example, width=64) for example in job.videos]
    with pytest.raises(UserError, match="a line of 64 x 64 pixels"):
        conditioning.read(dataclasses.replace(job, videos=tuple(others)))


def test_a_face_is_square_whatever_the_size(tmp_path):
    with pytest.raises(UserError, match=r"which 512 wide x 512 high would distort; crop it\.$"):
        control_video.read("face_video", clip(tmp_path, "clip", 1, 64, 96), 1, 512, 512, sized=False)


@pytest.mark.parametrize(("model", "key"), [("wan2.1-vace-1.3b", "reference_images"), ("wan2.2-animate-14b", "image")])
def test_what_becomes_of_a_whole_image_is_logged_and_nothing_refused(tmp_path, caplog, model, key):
    face = clip(tmp_path, "face", 5, 32, 32)
    words = [f"pose_video={clip(tmp_path, 'pose', 5, 64, 96)}", f"face_video={face}"] if key == "image" else []
    (tmp_path / "run.yml").write_text(f"model_name: {model}\nprompt: a cat\nsize: 96*64\nnum_frames: 5\n")
    for name, size in (("tall", (33, 66)), ("line", (2, 600))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    tall, line = (
        request.load([str(tmp_path / "run.yml"), *words, f"{key}={tmp_path}/{name}.png"]) for name in ("tall", "line")
    )
    with caplog.at_level(logging.INFO, "maxdiffusion"):
        conditioning.read(tall)
    assert f"tall.png: 33 x 66 pixels, made 32 x 64 on {'black' if key == 'image' else 'white'}" in caplog.text
    with pytest.raises(UserError, match=rf"{key}=.*line\.png is 2 wide x 600 high, of which nothing is left"):
        conditioning.read(line)


def test_a_size_follows_the_video(tmp_path):
    (tmp_path / "run.yml").write_text("model_name: wan2.1-vace-1.3b\nprompt: a cat\n")
    job = request.load([str(tmp_path / "run.yml"), f"video={clip(tmp_path, 'tall', 1, 160, 96)}", "num_frames=1"])
    assert (job.cfg.width, job.cfg.height) == (480, 816)
    conditioning.read(job)
