"""Read back what `maxdiffusion.media.write` writes."""

import json
import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageSequence, UnidentifiedImageError

from maxdiffusion.errors import UserError

_IMAGE_DESCRIPTION = 0x010E


def read_video(path: Path) -> UInt8[np.ndarray, "f h w c"]:
    """Read every frame of a video file, an animation, a .npy array or a folder of PNG frames as RGB.

    Animations merge equal neighbouring frames when written. Raises UserError where `path` is missing or none of these.
    """
    if path.is_dir():
        frames = [np.asarray(Image.open(frame).convert("RGB")) for frame in sorted(path.glob("*.png"))]
        if not frames:
            raise UserError(f"{path} is a folder without PNG frames; give a video file or a folder of frames")
        return np.stack(frames)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a video file or a folder of frames")
    if path.suffix == ".npy":
        return np.load(path)
    try:
        with Image.open(path) as animation:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)])
    except UnidentifiedImageError:
        return _read_with_ffmpeg(path)


def _read_with_ffmpeg(path: Path) -> np.ndarray:
    """Every frame that is stored, once, as a stream of PPM images (which carry their size)."""
    # Not imageio_ffmpeg.read_frames: it forks in Python, which jax warns of.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-fps_mode", "passthrough"]
    done = subprocess.run(
        [*command, "-f", "image2pipe", "-c:v", "ppm", "-"], capture_output=True, stdin=subprocess.DEVNULL
    )
    header = re.match(rb"P6\n(\d+) (\d+)\n255\n", done.stdout)
    if done.returncode or header is None:
        raise UserError(f"{path} is not a video that ffmpeg can read; give another file")
    width, height = int(header[1]), int(header[2])
    images = np.frombuffer(done.stdout, np.uint8).reshape(-1, len(header[0]) + width * height * 3)
    return images[:, len(header[0]) :].reshape(-1, height, width, 3)


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata that `write` stored in an mp4, gif, webp or folder of frames; empty where there is none."""
    source = path / "0000.png" if path.is_dir() else path
    if path.suffix == ".npy":
        return {}
    try:
        with Image.open(source) as image:
            comment = image.getexif().get(_IMAGE_DESCRIPTION) or image.info.get("comment") or image.info.get("Comment")
            comment = comment.decode() if isinstance(comment, bytes) else comment
    except UnidentifiedImageError:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-f", "ffmetadata", "-"]
        text = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL).stdout.decode()
        found = re.search(r"^comment=((?:[^\\\n]|\\.|\\\n)*)$", text, re.MULTILINE)
        comment = re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else None
    return json.loads(comment) if comment else {}
