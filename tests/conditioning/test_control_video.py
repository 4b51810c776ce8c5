"""What is refused of the videos that a run is controlled by, before anything is loaded."""

import dataclasses
import json
import logging
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import conditioning, request
from maxdiffusion.conditioning import control_video
from maxdiffusion.errors import UserError
from maxdiffusion.media.sound import Sound
from maxdiffusion.media.write import write
from tests.support.ffmpeg import ffmpeg


def clip(folder, name, frames, height, width, fmt="png"):
    path = folder / name
    write(np.full((frames, height, width, 3), 200, np.uint8), path, 12, fmt, {})
    return str(path)


def noise(frames, side):
    return np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)


def read(height, width, **keys):
    """`video` of such a run."""
    cfg = config(**keys)
    return control_video.read(cfg, "video", str(cfg.video), height, width)


def config(**keys):
    """The keys of a VACE run of 9 frames at 12 per second, taken at their times."""
    given = {"model_name": "wan2.1-vace-1.3b", "prompt": "a cat", "num_frames": 9, "fps": 12, "input_frames": "timed"}
    given |= keys
    return request.load(["run.yml", *(f"{key}={value}" for key, value in given.items())]).cfg


@pytest.fixture(autouse=True)
def empty_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yml").write_text("")


def test_what_is_used_of_a_video_is_logged(tmp_path, caplog):
    path = clip(tmp_path, "clip.mp4", 12, 64, 96, "mp4")
    with caplog.at_level(logging.INFO, "maxdiffusion"):
        found = read(32, 48, video=path)
    assert found.frames.shape == (9, 32, 48, 3)
    assert (
        "video: 0.75 of 1 s at 12 per second, each frame as shown at 12 per second; "
        "96 x 64 pixels, made 48 x 32; BT.709" in caplog.text
    )
    assert found.used.record() == {
        "file": path,
        "fps": 12,
        "frames": {"first": 0, "last": 8, "count": 9},
        "colour": "BT.709",
    }


@pytest.mark.parametrize(
    ("frames", "size", "words"),
    [
        (7, (64, 96), "has 7 frames, and num_frames=9 are to be made; give a longer one, or write num_frames=5"),
        (9, (64, 64), "is 64 wide x 64 high, which 96 wide x 64 high would distort; crop it, or write size=64.64"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, frames, size, words):
    with pytest.raises(UserError, match=words):
        read(64, 96, video=clip(tmp_path, "clip", frames, *size))


def test_a_mask_of_another_size_is_one_sentence(tmp_path):
    cfg = config(video=clip(tmp_path, "a", 9, 32, 48), mask=clip(tmp_path, "b", 9, 64, 96))
    video = control_video.read(cfg, "video", str(cfg.video), 64, 96)
    with pytest.raises(UserError, match=r"mask=.* has 96 x 64 pixels, but video has 48 x 32"):
        control_video.read(cfg, "mask", str(cfg.mask), 64, 96, video)


@pytest.mark.parametrize("fmt", ["mp4", "gif", "webp"])
def test_a_film_that_is_too_short_is_told_in_seconds(tmp_path, fmt):
    write(noise(20, 64), tmp_path / f"clip.{fmt}", 25, fmt, {})
    cfg = config(video=tmp_path / f"clip.{fmt}", num_frames=17, fps=10)
    words = (
        r"lasts 0.8 s .20 frames.*, which is 8 frames at fps=10, .* write num_frames=5, or input_frames=every .*20 fr"
    )
    with pytest.raises(UserError, match=words):
        control_video.read(cfg, "video", str(cfg.video), 64, 64)
    every = cfg.model_copy(update={"input_frames": "every"})
    assert control_video.read(every, "video", str(every.video), 64, 64).used.last == 16


def test_video_and_mask_of_different_rates_stay_together(tmp_path):
    """Brightness is the time: 30 and 24 stored frames per second, 16 shown."""
    for name, rate in (("video", 30), ("mask", 24)):
        levels = np.round(np.arange(2 * rate) * 120 / rate).astype(np.uint8)
        write(
            np.broadcast_to(levels[:, None, None, None], (2 * rate, 32, 32, 3)),
            tmp_path / f"{name}.mp4",
            rate,
            "mp4",
            {},
        )
    cfg = config(video=tmp_path / "video.mp4", mask=tmp_path / "mask.mp4", num_frames=29, fps=16)
    video = control_video.read(cfg, "video", str(cfg.video), 32, 32)
    mask = control_video.read(cfg, "mask", str(cfg.mask), 32, 32, video)
    right = np.arange(29) / 16 * 120
    for found, rate in ((video, 30), (mask, 24)):
        late = right - found.frames[:, 16, 16, 0]
        assert late.min() > -2 and late.max() < 120 / rate + 2


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_one_picture_is_a_mask_of_all_frames(tmp_path, caplog, suffix):
    Image.new("RGB", (96, 64), "white").save(tmp_path / f"mask{suffix}")
    cfg = config(video=clip(tmp_path, "clip", 9, 64, 96), mask=tmp_path / f"mask{suffix}")
    with caplog.at_level(logging.INFO, "maxdiffusion"):
        mask = control_video.read(cfg, "mask", str(cfg.mask), 64, 96)
    assert mask.frames.shape == (9, 64, 96, 3) and mask.frames.min() == 255
    assert "mask: one picture for all 9 frames; 96 x 64 pixels" in caplog.text
    with pytest.raises(UserError, match="is one picture, and num_frames=9 are to be made"):
        read(64, 96, video=tmp_path / f"mask{suffix}")


@pytest.mark.parametrize("name", ["cut-out.png", "cut-out.gif", "cut-out.webp", "frames"])
def test_of_a_cut_out_alpha_is_the_mask(tmp_path, caplog, name):
    image = np.zeros((32, 32, 4), np.uint8)
    image[:, :16] = (200, 30, 30, 255)
    if name == "frames":
        (tmp_path / name).mkdir()
    for i in range(9 if name == "frames" else 1):
        Image.fromarray(image).save(tmp_path / name / f"{i}.png" if name == "frames" else tmp_path / name)
    with caplog.at_level(logging.INFO, "maxdiffusion"):
        mask = control_video.read(config(), "mask", str(tmp_path / name), 32, 32)
    assert mask.frames[4, 8, :, 0].tolist() == [255] * 16 + [0] * 16
    assert "its alpha is the mask" in caplog.text


def test_dropped_sound_is_said(tmp_path, caplog):
    picture = ("-f", "lavfi", "-i", "color=gray:size=64x64:rate=12:duration=1")
    ffmpeg(*picture, "-f", "lavfi", "-i", "sine=d=1", "-pix_fmt", "yuv420p", tmp_path / "clip.mp4")
    with caplog.at_level(logging.INFO, "maxdiffusion"):
        read(64, 64, video=tmp_path / "clip.mp4")
    assert "; its sound is not kept" in caplog.text


@pytest.mark.parametrize(("sound", "said"), [(True, "the sound of video is kept"), (False, "no input video has sound")])
def test_kept_sound_is_that_of_the_input(tmp_path, caplog, sound, said):
    picture = ("-f", "lavfi", "-i", "color=gray:size=64x64:rate=24:duration=1")
    words = ("-f", "lavfi", "-i", "sine=d=1") if sound else ()
    path = str(tmp_path / "clip.mp4")
    ffmpeg(*picture, *words, "-pix_fmt", "yuv420p", path)
    keys = ["model_name=wan2.1-vace-1.3b", "size=64*64", "num_frames=9", "fps=12", "prompt=a", f"video={path}"]
    with caplog.at_level(logging.INFO, "maxdiffusion"):
        given = conditioning.read(request.load(["run.yml", *keys, "input_frames=timed", "keep_audio=true"]))
    assert given.sound == (Sound(path, Fraction(9, 12)) if sound else None)
    assert said in caplog.text and "not kept" not in caplog.text
    if sound:
        with pytest.raises(UserError, match=r"has 24 frames per second, and .* fps=12; write input_frames=timed"):
            conditioning.read(request.load(["run.yml", *keys, "input_frames=every", "keep_audio=true"]))


@pytest.mark.parametrize("size", [(64, 96), (70, 96), (48, 72), (1080, 1920)])
def test_sizes_that_differ_by_a_rounding_are_taken(tmp_path, size):
    height, width = (464, 832) if size[0] > 1000 else (64, 96)
    cfg = config(video=clip(tmp_path, "clip", 1, *size), num_frames=1)
    assert control_video.read(cfg, "video", str(cfg.video), height, width).frames.shape == (1, height, width, 3)


def test_unused_input_frames_are_refused():
    with pytest.raises(UserError, match="input_frames is only used with an input video"):
        config(input_frames="every")


def test_a_mask_and_a_line_of_another_size_are_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "run.yml").write_text("model_name: wan2.1-vace-1.3b\nprompt: a cat\nsize: 96*64\nnum_frames: 5\n")
    video, mask = clip(tmp_path, "video", 5, 64, 96), clip(tmp_path, "mask", 5, 32, 48)
    job = request.load([str(tmp_path / "run.yml"), f"video={video}", f"mask={mask}"])
    with pytest.raises(UserError, match=r"mask=.* has 48 x 32 pixels, but video has 96 x 64"):
        conditioning.read(job)
    job = request.load([str(tmp_path / "run.yml"), f"video={video}"])
    assert len(conditioning.read(job).digest()) == 64
    others = [dataclasses.replace(example, width=64) for example in job.videos]
    with pytest.raises(UserError, match="a line of 64 x 64 pixels"):
        conditioning.read(dataclasses.replace(job, videos=tuple(others)))


def test_the_record_says_what_was_used(tmp_path):
    write(noise(40, 64), tmp_path / "clip.mp4", Fraction(30000, 1001), "mp4", {})
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    words = [
        "run.yml",
        "model_name=wan2.1-vace-1.3b",
        "prompt=a cat",
        "size=64*64",
        "num_frames=17",
        "fps=16",
        "input_frames=timed",
    ]
    inputs = conditioning.read(request.load([*words, "video=clip.mp4", "mask=mask.png"]))
    used, one = {"first": 0, "last": 29, "count": 17}, {"first": 0, "last": 0, "count": 1}
    assert inputs.record() == {
        "video": {"file": "clip.mp4", "fps": "30000/1001", "frames": used, "colour": "BT.709"},
        "mask": {"file": "mask.png", "fps": None, "frames": one, "colour": "RGB"},
    }
    assert json.loads(json.dumps(inputs.record())) == inputs.record()


def test_a_face_is_square_whatever_the_size(tmp_path):
    with pytest.raises(UserError, match=r"which 512 wide x 512 high would distort; crop it\.$"):
        control_video.read(config(), "face_video", clip(tmp_path, "clip", 1, 64, 96), 512, 512, sized=False)


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
    assert (job.cfg.width, job.cfg.height) == (96, 160)
    conditioning.read(job)
    job = request.load(
        [str(tmp_path / "run.yml"), f"video={tmp_path / 'tall'}", "num_frames=1", "conventions=diffusers"]
    )
    assert (job.cfg.width, job.cfg.height) == (480, 816)


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ("16", "16"),
        ("29.97", "30000/1001"),
        ("23.976", "24000/1001"),
        ("23.98", "24000/1001"),
        ("59.94", "60000/1001"),
        ("24000/1001", "24000/1001"),
        ("12.5", "25/2"),
        ("29.9", "299/10"),
    ],
)
def test_rates_are_exact(given, rate):
    cfg = config(fps=given)
    assert cfg.fps == Fraction(rate)
    assert config(fps=cfg.to_json()["fps"]).fps == cfg.fps
    assert cfg.to_json()["fps"] == (16 if rate == "16" else rate)


@pytest.mark.parametrize("given", ["fast", "0", "300", "1/0", "16.123457", "nan"])
def test_what_is_no_rate_is_one_sentence(given):
    with pytest.raises(UserError, match=rf"fps={given} .*cannot be used: it should"):
        config(fps=given)
