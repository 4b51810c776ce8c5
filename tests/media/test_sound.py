"""The sound of an input beside new pictures, read back by ffmpeg's own program."""

import logging
from fractions import Fraction

import av
import numpy as np
import pytest

from maxdiffusion.media.samples import read_samples
from maxdiffusion.media.sound import Sound
from maxdiffusion.media.write import write
from tests.support.ffmpeg import ffmpeg

RATE = 16000
PICTURES = np.zeros((18, 32, 32, 3), np.uint8)
FPS = 12
BEEP = "aevalsrc=0.5*sin(880*PI*t)*gt(t\\,1):duration=3"  # silent up to 1 s


def heard(path):
    """The sound as mono samples, from the first picture on."""
    words = ("-af", "aresample=async=1:first_pts=0", "-ac", 1, "-ar", RATE, "-f", "f32le", "-")
    return np.frombuffer(ffmpeg("-i", path, "-vn", *words), np.float32)


def clip(path, *words):
    """A grey clip of 3 s with the beep."""
    picture = ("-f", "lavfi", "-i", "color=gray:size=64x64:rate=10:duration=3")
    ffmpeg(*picture, "-f", "lavfi", "-i", BEEP, "-pix_fmt", "yuv420p", *words, path)
    return str(path)


def written(folder, source, seconds):
    write(PICTURES, folder / "out.mp4", FPS, "mp4", {}, sound=Sound(source, Fraction(seconds)))
    return folder / "out.mp4"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("aac.mp4", ("-c:a", "aac", "-ar", 44100, "-ac", 2)),
        ("late.ts", ("-c:a", "aac")),  # whose times do not begin at 0
        ("flac.mkv", ("-c:a", "flac", "-ac", 6)),
        ("odd.mkv", ("-c:a", "pcm_s16le", "-ar", 37800)),
        ("opus.webm", ("-c:a", "libopus", "-c:v", "libvpx", "-ac", 2)),
    ],
)
def test_the_sound_is_in_time(tmp_path, name, words):
    path = written(tmp_path, clip(tmp_path / name, *words), Fraction(3, 2))
    samples = heard(path)
    first = np.argmax(np.abs(samples) > 0.1) / RATE
    assert abs(first - 1) < 0.01
    assert abs(len(samples) / RATE - 1.5) < 0.05  # two packets
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == len(PICTURES)
        assert container.streams.audio[0].codec_context.name == "aac"


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.wav", ()), ("a.mp3", ()), ("a.m4a", ("-c:a", "aac")), ("a.ogg", ("-c:a", "libopus")), ("a.ts", None)],
)
def test_a_sound_may_begin_within_the_file_as_its_samples_have_it(tmp_path, name, words):
    if words is None:  # a video
        source = clip(tmp_path / name, "-c:a", "aac")
    else:
        source = str(tmp_path / name)
        ffmpeg("-f", "lavfi", "-i", BEEP, *words, source)
    begins = np.argmax(np.abs(read_samples(source, RATE).values) > 0.1) / RATE
    sound = Sound(source, Fraction(3, 2), start=Fraction(3, 16))
    write(PICTURES, tmp_path / "out.mp4", FPS, "mp4", {}, sound=sound)
    first = np.argmax(np.abs(heard(tmp_path / "out.mp4")) > 0.1) / RATE
    assert abs(first - (begins - 3 / 16)) < 0.01


def test_aac_is_copied(tmp_path):
    source = clip(tmp_path / "a.mp4", "-c:a", "aac", "-b:a", "64k")

    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(audio=0) if packet.size]

    copied = packets(written(tmp_path, source, Fraction(3, 2)))
    assert copied == packets(source)[: len(copied)] and len(copied) > 20


def test_a_longer_result_ends_in_silence(tmp_path):
    path = written(tmp_path, clip(tmp_path / "a.mkv", "-c:a", "flac", "-t", 0.5), 2)
    assert len(heard(path)) / RATE < 0.6
    with av.open(str(path)) as container:
        assert container.streams.video[0].duration * container.streams.video[0].time_base == Fraction(3, 2)


def test_damaged_sound_is_a_warning(tmp_path, caplog):
    source = clip(tmp_path / "a.mkv", "-c:a", "flac")
    data = bytearray((tmp_path / "a.mkv").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    (tmp_path / "a.mkv").write_bytes(data)
    with caplog.at_level(logging.WARNING, "maxdiffusion"):
        path = written(tmp_path, source, 3)
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == len(PICTURES)


def test_a_file_without_sound_is_a_warning(tmp_path, caplog):
    ffmpeg("-f", "lavfi", "-i", "color=gray:size=64x64:rate=10:duration=1", "-pix_fmt", "yuv420p", tmp_path / "a.mp4")
    with caplog.at_level(logging.WARNING, "maxdiffusion"):
        path = written(tmp_path, str(tmp_path / "a.mp4"), 1)
    assert "has no sound" in caplog.text
    with av.open(str(path)) as container:
        assert not container.streams.audio


def test_other_formats_hold_no_sound(tmp_path):
    with pytest.raises(ValueError, match="webp holds no sound"):
        write(PICTURES, tmp_path / "a.webp", FPS, "webp", {}, sound=Sound("x", Fraction(1)))
