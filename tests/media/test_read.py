import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from maxdiffusion.errors import UserError
from maxdiffusion.media.read import frames_per_second, read_metadata, read_video
from maxdiffusion.media.write import FORMATS, write

FRAMES = np.broadcast_to(np.arange(0, 250, 25, dtype=np.uint8)[:, None, None, None], (10, 32, 48, 3)).copy()


@pytest.mark.parametrize(
    ("name", "words"), [("missing.mp4", "does not exist"), ("text.mp4", "not a video"), ("", "without PNG")]
)
def test_what_is_no_video_is_one_sentence(tmp_path, name, words):
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(UserError, match=words):
        read_video(tmp_path / name)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_limit_gives_the_first_frames(tmp_path, fmt):
    path = tmp_path / f"clip{FORMATS[fmt].suffix}"
    write(FRAMES, path, 12, fmt, {})
    np.testing.assert_array_equal(read_video(path, 4), read_video(path)[:4])
    assert len(read_video(path, 40)) == 10
    if fmt == "mp4":
        assert frames_per_second(path) == 12


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_file_that_ends_early_is_one_sentence(tmp_path, fmt):
    noise = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"clip{FORMATS[fmt].suffix}"
    write(noise, path, 12, fmt, {})
    file = sorted(path.iterdir())[5] if fmt == "png" else path
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="clip"):
        read_video(path)


def test_a_video_without_a_picture_is_one_sentence(tmp_path):
    path = tmp_path / "sound.wav"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", "sine=duration=0.1"]
    subprocess.run([*command, str(path)], check=True)
    with pytest.raises(UserError, match="not a video"):
        read_video(path)
    assert frames_per_second(path) is None


def test_frames_follow_their_numbers(tmp_path):
    for i in range(9, 12):
        Image.new("L", (8, 8), i).save(tmp_path / f"frame_{i}.png")
    assert [int(frame.max()) for frame in read_video(tmp_path)] == [9, 10, 11]
    assert [int(frame.max()) for frame in read_video(tmp_path, 2)] == [9, 10]


def test_frames_of_16_bits_keep_their_greys(tmp_path):
    (tmp_path / "frames").mkdir()
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "frames" / "0.png")
    assert read_video(tmp_path / "frames")[0, 0, :, 0].tolist() == [0, 100, 255]


def test_a_video_of_10_bits_is_read(tmp_path):
    path = tmp_path / "clip.mkv"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", "color=gray:s=32x16:d=1:r=4"]
    subprocess.run([*command, "-c:v", "ffv1", "-pix_fmt", "yuv420p10le", str(path)], check=True)
    frames = read_video(path)
    assert frames.shape == (4, 16, 32, 3) and abs(frames.astype(int) - 128).max() <= 2


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(FRAMES, Path("12:30.mp4"), 12, "mp4", {"prompt": "a"})
    assert len(read_video("12:30.mp4")) == 10
    assert frames_per_second("12:30.mp4") == 12
    assert read_metadata(Path("12:30.mp4"))["prompt"] == "a"


@pytest.mark.parametrize("url", ["http://127.0.0.1/a b.mp4", "http://[half/a.mp4", "file:///a.mp4"])
def test_what_is_no_url_is_one_sentence(url):
    with pytest.raises(UserError, match="http"):
        read_video(url)


def test_frames_of_different_sizes_are_refused(tmp_path):
    for i, side in enumerate((8, 16)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="2 different sizes"):
        read_video(tmp_path)


@pytest.mark.parametrize("array", [np.zeros((2, 4, 4)), np.zeros((2, 4, 4, 3)), np.array(["a"], object)])
def test_an_array_that_is_no_video_is_refused(tmp_path, array):
    np.save(tmp_path / "clip.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=r"clip\.npy"):
        read_video(tmp_path / "clip.npy")
