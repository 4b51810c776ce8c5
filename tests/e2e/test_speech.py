"""Sounds given to the S2V command: a video with the sound, or one sentence before weights load."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import cli
from maxdiffusion.media.read import read_video
from maxdiffusion.media.samples import read_samples
from tests.support import official, official_s2v, sounds
from tests.support.ffmpeg import encode, ffmpeg

BEEP = "aevalsrc=0.5*sin(880*PI*t)*gt(t\\,0.5):duration=1"  # silent up to 0.5 s
FRAMES, DROPPED = 13, 3  # of a second


@pytest.fixture
def run(speaker, tmp_path, capsys):
    """Runs the command with a sound and more words: (exit code, what it says, the video)."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image.png")

    def command(sound: object, *more: str) -> tuple[int, str, Path]:
        words = [*official_s2v.words(speaker, tmp_path, clip=16), *official.ONE, f"image={tmp_path / 'image.png'}"]
        words += [f"audio={sound}", f"save_file={tmp_path / 'made.mp4'}", "jax_cache_dir=", "log_level=info"]
        code = cli.command([*words, "num_inference_steps=2", "guidance_scale=1", *more])
        return code, capsys.readouterr().err, tmp_path / "made.mp4"

    return command


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of a server of that folder."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def beep(path: Path, *words: object) -> Path:
    ffmpeg("-f", "lavfi", "-i", BEEP, *words, path)
    return path


@pytest.mark.slow
def test_a_second_of_stereo_silence_makes_a_silent_video(run, tmp_path):
    code, said, video = run(sounds.write(tmp_path / "a.wav", np.zeros((2, 44100)), 44100))
    assert code == 0 and "44100 Hz, 2 channels" in said and "is silent from beginning to end" in said
    assert read_video(video).shape == (FRAMES, 64, 64, 3)
    made = read_samples(str(video), 44100)
    assert np.abs(made.values).max() < 1e-3 and "44100 Hz, 2 channels" in made.stored
    assert abs(made.seconds - FRAMES / 16) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("source", ["a.wav", "a.mp4", "url"])
def test_the_video_has_the_sound_in_time(run, tmp_path, monkeypatch, source):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    file = beep(tmp_path / "a.wav", "-ac", 2, "-ar", 44100)
    if source == "a.mp4":
        grey = np.full((25, 16, 16, 3), 128, np.uint8)
        file = encode(tmp_path / "a.mp4", grey, 25, "-i", file, "-c:a", "aac")
    with served(tmp_path) as url:
        code, said, video = run(f"{url}/a.wav" if source == "url" else file)
    assert code == 0, said
    assert read_video(video).shape == (FRAMES, 64, 64, 3)
    begins = np.argmax(np.abs(read_samples(str(video), 16000).values) > 0.1) / 16000
    assert abs(begins - (0.5 - DROPPED / 16)) < 0.025


@pytest.mark.parametrize("more", [(), ("num_frames=9",)], ids=["as long as the sound", "frames given"])
def test_what_has_no_sound_is_refused_before_weights_load(run, tmp_path, monkeypatch, more):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mute = encode(tmp_path / "mute.mp4", np.zeros((8, 16, 16, 3), np.uint8), 8)
    damaged = beep(tmp_path / "damaged.flac")
    data = damaged.read_bytes()
    damaged.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with served(tmp_path) as url:
        faults = {mute: "has no sound", damaged: "is damaged", f"{url}/absent.wav": "cannot be fetched"}
        for sound, words in faults.items():
            code, said, video = run(sound, *more)
            assert code == 2 and said.splitlines()[-1].startswith(f"error: {sound} {words}")
            assert "load checkpoint" not in said and not video.exists()
