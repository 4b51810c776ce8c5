"""The ffmpeg program of imageio-ffmpeg, which shares no code with PyAV's libraries: a second writer and reader."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np


def ffmpeg(*words: object, data: bytes | None = None) -> bytes:
    """Runs it; returns what it writes to its output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-threads", "1", *map(str, words)]
    return subprocess.run(command, input=data, check=True, stdout=subprocess.PIPE).stdout


def encode(path: Path, frames: np.ndarray, rate: object, *words: object) -> Path:
    """Writes RGB frames (f h w 3, uint8) with options for filters, codec and colours."""
    _, height, width, _ = frames.shape
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-")
    ffmpeg(*raw, *words, path, data=frames.tobytes())
    return path


def decode(path: Path, filters: str, height: int, width: int, form: str = "rgb24") -> np.ndarray:
    """Frames as ffmpeg's filters make them: f h w 3 uint8, or for gbrpf32le f h w 3 float32."""
    words = ("-vf", filters, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", form, "-")
    data = ffmpeg("-i", path, *words)
    if form == "rgb24":
        return np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)
    planes = np.frombuffer(data, np.float32).reshape(-1, 3, height, width)
    return planes[:, [2, 0, 1]].transpose(0, 2, 3, 1)
