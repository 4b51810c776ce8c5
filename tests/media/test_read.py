import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from maxdiffusion.errors import UserError
from maxdiffusion.media.read import VideoInfo, probe, read_clip, read_video, spread
from maxdiffusion.media.write import write
from tests.support.media import CLIPS, read_metadata

FRAMES = np.broadcast_to(np.arange(0, 250, 25, dtype=np.uint8)[:, None, None, None], (10, 32, 48, 3)).copy()


def noise_clip(folder, fmt):
    """A film of ten frames of noise, none of which compresses."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    path = folder / f"clip{CLIPS[fmt]}"
    write(noise, path, 12, fmt, {})
    return path


def encode(path, frames, codec="libx264", pix_fmt="yuv420p", times=None, rotation=None, every=12):
    """A video of frames in `pix_fmt`, at 4 per second or at the given times in quarters of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, 4)
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = pix_fmt
        stream.gop_size = every
        if rotation is not None:
            stream.set_display_rotation(*rotation)
        for time, pixels in zip(times or range(len(frames)), frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format=pix_fmt, threads=1)
            frame.pts, frame.time_base = time, Fraction(1, 4)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "words"), [("missing.mp4", "does not exist"), ("text.mp4", "not a video"), ("", "without frames")]
)
def test_what_is_no_video_is_one_sentence(tmp_path, name, words):
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(UserError, match=words):
        read_video(tmp_path / name)


@pytest.mark.parametrize("fmt", CLIPS)
def test_a_limit_gives_the_first_frames(tmp_path, fmt):
    path = tmp_path / f"clip{CLIPS[fmt]}"
    write(FRAMES, path, 12, fmt, {})
    np.testing.assert_array_equal(read_video(path, 4), read_video(path)[:4])
    assert len(read_video(path, 40)) == 10
    if fmt == "mp4":
        assert probe(path).fps == 12


@pytest.mark.parametrize("fmt", ["png", "npy", "webp"])
def test_a_file_that_ends_early_is_one_sentence(tmp_path, fmt):
    path = noise_clip(tmp_path, fmt)
    file = sorted(path.iterdir())[5] if fmt == "png" else path
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="clip"):
        read_video(path)


@pytest.mark.parametrize(
    ("fmt", "words"), [("gif", "of its frames are damaged or missing"), ("mp4", "s of it are missing")]
)
def test_of_a_film_that_ends_early_the_rest_is_read(tmp_path, fmt, words):
    path = noise_clip(tmp_path, fmt)
    whole = read_video(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clip = read_clip(path)
    assert 2 <= len(clip.frames) < 10 and words in clip.damage
    np.testing.assert_array_equal(clip.frames[0], whole[0])


def test_a_damaged_packet_costs_no_other_frame(tmp_path):
    path = noise_clip(tmp_path, "mp4")
    whole = read_clip(path)
    assert whole.damage == ""
    with av.open(str(path)) as container:
        packet = next(container.demux(video=0))
    content = bytearray(path.read_bytes())
    middle = packet.pos + packet.size // 2
    content[middle : middle + 20] = bytes(range(20))
    path.write_bytes(content)
    clip = read_clip(path)
    assert len(clip.frames) >= 9 and re.fullmatch(r"\d+ of its frames are damaged or missing", clip.damage)


@pytest.mark.parametrize("suffix", [".ts", ".mkv"])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_lost_packets_are_counted(tmp_path, suffix, lost):
    frames = [*FRAMES, *FRAMES]
    encode(tmp_path / f"whole{suffix}", frames, "libx264" if suffix == ".ts" else "mjpeg", "yuvj420p", every=1)
    path = tmp_path / f"clip{suffix}"
    with av.open(str(tmp_path / f"whole{suffix}")) as whole, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        for number, packet in enumerate(whole.demux(video=0)):
            if packet.size and not 7 <= number < 7 + lost:
                packet.stream = stream
                container.mux(packet)
    clip = read_clip(path)
    assert len(clip.frames) == 20 - lost
    assert clip.damage == (f"{lost} of its frames are damaged or missing" if lost else "")


def sound(path, cover=False):
    with av.open(str(path), "w", "wav" if path.suffix == ".wav" else "mp4") as container:
        stream = container.add_stream("aac" if path.suffix == ".m4a" else "pcm_s16le", 8000)
        stream.layout = "mono"
        picture = container.add_stream("mjpeg", 1) if cover else None
        if picture:
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
            picture.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.int16 if path.suffix == ".wav" else np.float32),
            "s16" if path.suffix == ".wav" else "fltp",
            "mono",
        )
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if picture:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(FRAMES[0], "rgb24").reformat(32, 32, "yuvj420p")))
            container.mux(picture.encode())


@pytest.mark.parametrize(
    ("name", "cover", "words"), [("a.wav", False, "sound .pcm_s16le, 0.128 s. without"), ("a.m4a", True, "and a cover")]
)
def test_sound_is_no_video(tmp_path, name, cover, words):
    sound(tmp_path / name, cover)
    with pytest.raises(UserError, match=words):
        probe(tmp_path / name)


def test_a_playlist_opens_no_other_file(tmp_path):
    encode(tmp_path / "a.mp4", FRAMES)
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'a.mp4'}\n")
    with pytest.raises(UserError, match=r"cannot be read|not a video"):
        read_video(tmp_path / "list.mp4")


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
    encode(tmp_path / "clip.mkv", np.full((4, 16, 32, 3), 128, np.uint8), "ffv1", "yuv420p10le")
    frames = read_video(tmp_path / "clip.mkv")
    assert frames.shape == (4, 16, 32, 3) and abs(frames.astype(int) - 128).max() <= 1


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_at_uneven_times_are_each_read_once(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    encode(path, FRAMES[:5], times=[0, 1, 5, 6, 20])
    assert abs(read_video(path)[:, 0, 0, 0].astype(int) - [0, 25, 50, 75, 100]).max() <= 3


@pytest.mark.parametrize(
    ("rotation", "upright"),
    [
        ((90,), lambda image: np.rot90(image)),
        ((180,), lambda image: np.rot90(image, 2)),
        ((270,), lambda image: np.rot90(image, 3)),
        ((0, True), lambda image: image[:, ::-1]),
        ((0, False, True), lambda image: image[::-1]),
    ],
)
def test_a_video_is_turned_as_its_camera_noted(tmp_path, rotation, upright):
    corners = np.full((32, 48, 3), 128, np.uint8)
    corners[:16, :16], corners[16:, 32:] = 30, 230
    encode(tmp_path / "clip.mp4", [corners] * 2, rotation=rotation)
    back = read_video(tmp_path / "clip.mp4")
    assert back.shape[1:] == upright(corners).shape
    assert abs(back.astype(int) - upright(corners)).mean() <= 3


def test_a_video_is_described(tmp_path):
    encode(tmp_path / "clip.mp4", FRAMES, rotation=(90,))
    assert probe(tmp_path / "clip.mp4") == VideoInfo(32, 48, Fraction(4), 10)
    encode(tmp_path / "clip.mkv", FRAMES[:4], times=[0, 1, 5, 6])  # Matroska states no number
    assert probe(tmp_path / "clip.mkv").frames is None
    write(FRAMES, tmp_path / "frames", 12, "png", {})
    assert probe(tmp_path / "frames") == VideoInfo(48, 32, None, 10)


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(FRAMES, Path("12:30.mp4"), 12, "mp4", {"prompt": "a"})
    assert len(read_video("12:30.mp4")) == 10
    assert probe("12:30.mp4").fps == 12
    assert read_metadata(Path("12:30.mp4"))["prompt"] == "a"


@pytest.mark.parametrize("url", ["http://127.0.0.1/a b.mp4", "http://[half/a.mp4", "file:///a.mp4"])
def test_what_is_no_url_is_one_sentence(url):
    with pytest.raises(UserError, match="http"):
        read_video(url)


def test_frames_of_different_sizes_are_refused(tmp_path):
    for i, side in enumerate((8, 16)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="different sizes"):
        read_video(tmp_path)


@pytest.mark.parametrize("array", [np.zeros((2, 4, 4)), np.zeros((2, 4, 4, 3)), np.array(["a"], object)])
def test_an_array_that_is_no_video_is_refused(tmp_path, array):
    np.save(tmp_path / "clip.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=r"clip\.npy"):
        read_video(tmp_path / "clip.npy")


@pytest.mark.parametrize(
    ("stored", "count", "fps"), [(100, 81, 25), (81, 81, 16), (300, 81, 30), (37, 9, 24), (9, 1, 8)]
)
def test_frames_are_spread_as_in_the_official_code(stored, count, fps):
    """`VaceVideoProcessor` of Wan2.1 written out, in exact numbers."""
    frames = [(Fraction(i, fps), Fraction(i + 1, fps)) for i in range(stored)]
    starts, ends = np.array(frames, dtype=object).T
    asked = np.array([sum(frames[-1]) / 2 * k / max(count - 1, 1) for k in range(count)], dtype=object)
    shown = (asked[:, None] >= starts) & (asked[:, None] <= ends)
    theirs = np.argmax(shown.astype(bool), axis=1).tolist()
    assert spread(frames, count) == theirs
    assert theirs[0] == 0 and theirs[-1] == (stored - 1 if count > 1 else 0)


def test_frames_at_their_own_times_are_spread_over_time():
    frames = [(Fraction(0), Fraction(1)), *((1 + Fraction(i, 10), 1 + Fraction(i + 1, 10)) for i in range(10))]
    assert spread(frames, 5) == [0, 0, 0, 5, 10]
    assert spread(frames, 12) == list(range(12))  # as many as there are, and one that is missing
