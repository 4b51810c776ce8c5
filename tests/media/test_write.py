import logging
import os
import resource
import shutil
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from maxdiffusion.errors import UserError
from maxdiffusion.media.read import probe, read_clip, read_video, times
from maxdiffusion.media.write import FORMATS, check_format, write
from tests.support.media import CLIPS, read_metadata

PROMPT = 'Ein "rötes" Bild = 圆; a \\ # b\nnext line \udcff'
COLOURS = [
    (220, 30, 30), (30, 200, 40), (20, 40, 230), (240, 240, 20), (250, 250, 250),
    (0, 0, 0), (128, 128, 128), (0, 0, 128), (165, 42, 42),
]  # fmt: skip


@pytest.fixture
def frames():
    """Nine flat frames of 48 x 64, each of another colour."""
    return np.broadcast_to(np.array(COLOURS, np.uint8)[:, None, None], (9, 48, 64, 3)).copy()


def target(folder, fmt):
    return folder / (f"clip{CLIPS.get(fmt, '.jpg')}")


@pytest.mark.parametrize(("fmt", "error"), [("mp4", 4), ("gif", 0), ("webp", 6), ("png", 0), ("npy", 0)])
@pytest.mark.parametrize("chunked", [False, True])
def test_frames_and_metadata_come_back(tmp_path, frames, fmt, error, chunked):
    path = target(tmp_path, fmt)
    given = iter([frames[:1], frames[1:5], frames[5:]]) if chunked else frames
    metadata = {"prompt": PROMPT, "seed": "7"}
    write(given, path, 16, fmt, metadata)
    assert os.listdir(tmp_path) == [path.name]
    back = read_video(path)
    assert back.dtype == np.uint8 and back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).max() <= error
    assert read_metadata(path) == ({} if fmt == "npy" else metadata)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_video_may_have_one_frame(tmp_path, frames, fmt):
    write(frames[:1], target(tmp_path, fmt), 16, fmt, {"prompt": "a cat"})
    assert read_video(target(tmp_path, fmt)).shape == (1, 48, 64, 3)
    assert read_metadata(target(tmp_path, fmt)) == ({} if fmt == "npy" else {"prompt": "a cat"})
    assert target(tmp_path, fmt).is_file()


@pytest.mark.parametrize(("fmt", "error"), [("png", 0), ("jpg", 3), ("webp", 6)])
def test_one_frame_is_a_picture_in_its_colours(tmp_path, frames, fmt, error):
    for colour in frames:
        write(colour[None], tmp_path / "One.PIC", 16, fmt, {"seed": "7"}, overwrite=True)
        with Image.open(tmp_path / "One.PIC") as image:
            assert image.format == {"jpg": "JPEG"}.get(fmt, fmt.upper())
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - colour).max() <= error


def test_metadata_too_long_for_a_jpg_are_said(tmp_path, frames, caplog):
    with caplog.at_level(logging.INFO):
        write(frames[:1], tmp_path / "a.jpg", 16, "jpg", {"prompt": "a cat and " * 20_000})
    assert "do not fit into a jpg" in caplog.text and read_metadata(tmp_path / "a.jpg") == {}


@pytest.mark.parametrize("fmt", [fmt for fmt in CLIPS if fmt != "npy"])
def test_a_prompt_longer_than_any_argument_is_stored_whole(tmp_path, frames, fmt):
    metadata = {"prompt": "a cat and " * 20_000}
    write(frames, target(tmp_path, fmt), 16, fmt, metadata)
    assert read_metadata(target(tmp_path, fmt)) == metadata


@pytest.mark.parametrize("fmt", CLIPS)
def test_without_metadata_nothing_of_it_is_stored(tmp_path, frames, fmt):
    write(frames, target(tmp_path, fmt), 16, fmt, {})
    assert read_metadata(target(tmp_path, fmt)) == {}
    if fmt == "mp4":
        with av.open(str(target(tmp_path, fmt))) as container:
            assert not {"title", "comment"} & set(container.metadata)


def test_the_mp4_is_what_every_player_takes(tmp_path, frames):
    path = tmp_path / "clip.mp4"
    write(frames, path, 7.5, "mp4", {"prompt": "a cat", "seed": "3"})
    with av.open(str(path)) as container:
        (stream,) = container.streams
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, codec.width, codec.height) == ("h264", "yuv420p", 64, 48)
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (
            1,
            1,
            1,
            1,
        )  # BT.709, tv
        assert (stream.average_rate, stream.frames, container.duration) == (7.5, 9, 1_200_000)
        assert container.metadata["title"] == "a cat"
        assert container.metadata["comment"] == '{"prompt": "a cat", "seed": "3"}'
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index first: it plays while it loads


def test_a_still_video_keeps_all_its_frames(tmp_path):
    still = np.full((17, 32, 32, 3), 77, np.uint8)
    write(still, tmp_path / "a.mp4", 16, "mp4", {})
    assert read_video(tmp_path / "a.mp4").shape == still.shape


@pytest.mark.parametrize(("fmt", "fps", "tick"), [("gif", 16, 10), ("gif", 50, 10), ("webp", 24, 1)])
def test_animations_keep_the_time(tmp_path, frames, fmt, fps, tick):
    write(frames, target(tmp_path, fmt), fps, fmt, {})
    with Image.open(target(tmp_path, fmt)) as animation:
        durations = []
        for index in range(animation.n_frames):
            animation.seek(index)
            animation.load()
            durations.append(animation.info["duration"])
        assert animation.info["loop"] == 0
    assert abs(sum(durations) - 9000 / fps) <= tick / 2
    assert max(durations) - min(durations) <= tick


@pytest.mark.parametrize(
    ("fmt", "shape", "fps", "words"),
    [
        ("mp4", (1, 33, 32, 3), 16, "32 wide x 33 high cannot be an mp4"),
        ("gif", (1, 32, 32, 3), 60, "at most 50"),
        ("webp", (1, 32, 32, 3), 1001, "at most 1000"),
        ("avi", (1, 32, 32, 3), 16, "unknown output_format=avi; choose one of mp4, gif"),
    ],
)
def test_what_a_format_cannot_hold_is_one_sentence(tmp_path, fmt, shape, fps, words):
    with pytest.raises(UserError, match=words):
        write(np.zeros(shape, np.uint8), tmp_path / "a", fps, fmt, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fmt", CLIPS)
@pytest.mark.parametrize("failure", [RuntimeError("decoder"), KeyboardInterrupt()])
def test_a_failure_between_chunks_leaves_nothing(tmp_path, frames, fmt, failure):
    def chunks():
        yield frames[:4]
        raise failure

    with pytest.raises(type(failure)):
        write(chunks(), target(tmp_path, fmt), 16, fmt, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fmt", CLIPS)
def test_existing_results_stay_unless_told(tmp_path, frames, fmt):
    path = target(tmp_path, fmt)
    write(frames[:5], path, 16, fmt, {})
    with pytest.raises(UserError, match="exists already"):
        write(frames, path, 16, fmt, {})
    assert len(read_video(path)) == 5
    write(frames[:2], path, 16, fmt, {}, overwrite=True)
    assert len(read_video(path)) == 2
    assert os.listdir(tmp_path) == [path.name]


def test_a_folder_of_other_things_is_never_replaced(tmp_path, frames):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0000.jpg").write_bytes(b"dear")
    with pytest.raises(UserError, match=r"holds other things than frames \(0000\.jpg\)"):
        write(frames, tmp_path / "photos", 16, "png", {}, overwrite=True)
    assert os.listdir(tmp_path / "photos") == ["0000.jpg"]


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (9, 256, 256, 3), np.uint8)


@pytest.mark.parametrize("fmt", CLIPS)
def test_a_limit_of_the_system_is_one_sentence(tmp_path, noise, fmt):
    """The real system call fails: files of this process may have 20 kB (EFBIG; ffmpeg dies of SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*clip|ffmpeg could not encode"):
            write(noise, target(tmp_path, fmt), 16, fmt, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("fmt", CLIPS)
def test_a_full_disk_is_one_sentence(small_disk, noise, fmt):
    with pytest.raises(UserError, match="the disk is full"):
        write(noise, target(small_disk, fmt), 16, fmt, {"prompt": "a cat"})
    assert os.listdir(small_disk) == []


def test_ffmpeg_s_own_complaint_is_passed_on(tmp_path):
    wide = np.zeros((1, 2, 20_000, 3), np.uint8)  # H.264 has at most 16,384 columns
    with pytest.raises(UserError, match=r"ffmpeg could not encode the mp4 \(.+\)"):
        write(wide, tmp_path / "a.mp4", 16, "mp4", {})
    assert os.listdir(tmp_path) == []


def moving():
    """Gradients that move, 17 frames of 96 x 160."""
    y, x = np.mgrid[:96, :160]
    frames = [
        np.stack([(x + 3 * t) % 256, (2 * y + t) % 256, 128 + 60 * np.sin(x / 20 + t / 3)], -1) for t in range(17)
    ]
    return np.stack(frames).astype(np.uint8)


def test_ten_rounds_make_a_video_neither_darker_nor_brighter(tmp_path):
    """0.5 of a level on average; the codec alone moves red and blue by 1, and libswscale's fast path all by -11."""
    clip = back = moving()
    for _ in range(10):
        write(back, tmp_path / "a.mp4", 16, "mp4", {}, overwrite=True)
        back = read_video(tmp_path / "a.mp4")
    drift = (back.astype(float) - clip).mean((0, 1, 2))
    assert abs(drift.mean()) < 1 and abs(drift).max() < 2


def test_chroma_of_an_mp4_lies_at_the_left(tmp_path):
    """Where a player expects it: the first column of chroma belongs to column 0 alone, not to 0 and 1."""
    ramp = np.zeros((2, 32, 64, 3), np.uint8)
    ramp[..., 2] = np.arange(64) * 4
    write(ramp, tmp_path / "a.mp4", 16, "mp4", {})
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0)).to_ndarray().reshape(-1)
    blue = frame[32 * 64 :][: 16 * 32].reshape(16, 32).astype(float)
    at_left = 128 + 112 * np.arange(0, 256, 8) / 255
    assert abs((blue - at_left)[:, 4:-4].mean()) < 0.5  # in the middle of two columns: 0.9


LOOP = """
import itertools, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from maxdiffusion.media.write import write

folder, frames = Path(sys.argv[1]), np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)

def one_round(n):
    for fmt, suffix in (("mp4", ".mp4"), ("png", ""), ("npy", ".npy"), ("webp", ".webp")):
        write(frames, folder / (str(n) + suffix), 16, fmt, {"seed": "7"}, overwrite=True)

one_round(0)
random.seed(1)
cut = 0
for _ in range(12):
    child = os.fork()
    if not child:
        for n in itertools.count(0):
            one_round(n)
    time.sleep(random.uniform(0.02, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut += any(folder.glob(".*"))
print(cut)
"""


def test_killed_at_any_moment_every_named_file_is_whole(tmp_path):
    """SIGKILL twelve times, at moments spread over several writings; each run meets what the last one left."""
    done = subprocess.run([sys.executable, "-c", LOOP, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 3  # so many were cut in the middle of a file
    named = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert {path.suffix for path in named} == {".mp4", "", ".npy", ".webp"}
    for path in named:
        assert read_video(path).shape == (9, 64, 64, 3)
    assert all(path.name.endswith(".part") for path in tmp_path.glob(".*"))


@pytest.mark.parametrize("rate", ["30000/1001", "24000/1001", "60000/1001", "25/2", "16", "240"])
def test_an_mp4_has_exactly_its_rate(tmp_path, rate):
    frames = np.zeros((7, 16, 16, 3), np.uint8)
    write(frames, tmp_path / "a.mp4", Fraction(rate), "mp4", {})
    info = probe(tmp_path / "a.mp4")
    assert (info.fps, info.frames) == (Fraction(rate), 7)
    assert read_clip(tmp_path / "a.mp4", times(20, Fraction(rate))).indices == tuple(range(7))


def test_a_format_without_its_encoder_is_refused_before_the_work(monkeypatch):
    check_format("mp4")
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    check_format("webp")
    with pytest.raises(UserError, match="needs the encoder libx264"):
        check_format("mp4")
