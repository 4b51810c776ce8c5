"""Sounds read by `media.samples`: any container, and one sentence where there is none."""

import numpy as np
import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.media.samples import read_samples
from tests.support.ffmpeg import encode, ffmpeg

RATE = 16000


def tone(path, seconds=1.0, source="sine=frequency=440", *words):
    ffmpeg("-f", "lavfi", "-i", f"{source}:duration={seconds}", *words, path)
    return str(path)


def pitch(samples):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return np.argmax(spectrum) * RATE / len(samples)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.m4a", "a.ogg", "a.flac"])
def test_a_stereo_sound_becomes_mono_at_the_rate_asked_for(tmp_path, name):
    found = read_samples(tone(tmp_path / name, 1.5, "sine=frequency=440:sample_rate=44100", "-ac", 2), RATE)
    assert found.rate == RATE and found.values.dtype == np.float32 and not found.silent
    assert abs(found.seconds - 1.5) < 0.1  # mp3 and ogg add to the ends
    assert abs(pitch(found.values[:RATE]) - 440) < 2
    assert "44100 Hz, 2 channels" in found.stored


def test_channels_are_averaged_and_no_sample_is_lost(tmp_path):
    path = tone(tmp_path / "a.wav", 1, "aevalsrc=0.5|-0.25:s=16000", "-c:a", "pcm_f32le")
    found = read_samples(path, RATE)
    np.testing.assert_allclose(found.values, np.full(RATE, 0.125, np.float32), atol=1e-6)


def test_silence_is_read_and_said(tmp_path, caplog):
    found = read_samples(tone(tmp_path / "a.wav", 1, "anullsrc=r=44100:cl=stereo"), RATE)
    assert found.silent and len(found.values) == RATE and "silent" in caplog.text


def test_ten_minutes_are_read(tmp_path):
    found = read_samples(tone(tmp_path / "a.mp3", 600), RATE)
    assert abs(found.seconds - 600) < 0.1


def test_a_video_s_sound_is_read(tmp_path):
    path, frames = tmp_path / "a.mp4", np.zeros((8, 16, 16, 3), np.uint8)
    encode(path, frames, 8, "-f", "lavfi", "-i", "sine=frequency=440:duration=1", "-c:a", "aac")
    assert abs(pitch(read_samples(str(path), RATE).values) - 440) < 2


def test_what_has_no_sound_gets_one_sentence(tmp_path):
    video = encode(tmp_path / "mute.mp4", np.zeros((8, 16, 16, 3), np.uint8), 8)
    text, whole = tmp_path / "a.txt", tmp_path / "a.flac"
    text.write_text("no sound " * 100)
    tone(whole)
    damaged = tmp_path / "damaged.flac"
    data = bytearray(whole.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    damaged.write_bytes(data)
    for path, words in (
        (video, "has no sound"),
        (text, "has no sound|cannot be read as a sound"),
        (damaged, "damaged"),
        (tmp_path / "absent.wav", "does not exist"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(UserError, match=words) as error:
            read_samples(str(path), RATE)
        assert str(error.value).count(". ") == 0 and str(path) in str(error.value)
