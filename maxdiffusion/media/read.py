"""Read videos, and back what `maxdiffusion.media.write` writes."""

import itertools
import json
import re
import subprocess
import tempfile
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageSequence, UnidentifiedImageError

from maxdiffusion.errors import UserError
from maxdiffusion.media.fetch import as_rgb, download

_IMAGE_DESCRIPTION = 0x010E


def read_video(path: Path | str, limit: int | None = None) -> UInt8[np.ndarray, "f h w c"]:
    """Read the frames of a video file, an animation, a .npy array or a folder of PNG frames as RGB.

    A text may be an http(s) URL of one file. Animations merge equal neighbouring frames when written. `limit` reads no
    more than that many frames.

    Raises UserError where `path` is missing, none of these, or has frames of different sizes.
    """
    if "://" in str(path):
        content = download(str(path))
        with tempfile.NamedTemporaryFile(suffix=Path(urllib.parse.urlsplit(str(path)).path).suffix) as copy:
            copy.write(content)
            copy.flush()
            try:
                return read_video(Path(copy.name), limit)
            except UserError as error:
                raise UserError(str(error).replace(copy.name, str(path))) from None
    path = Path(path)
    try:
        if path.is_dir():
            files = sorted(path.glob("*.png"), key=_in_order)[:limit]
            if not files:
                raise UserError(f"{path} is a folder without PNG frames; give a video file or a folder of frames.")
            return _stacked(path, (np.asarray(as_rgb(Image.open(file))) for file in files))
        if not path.is_file():
            raise UserError(f"{path} does not exist; give a video file or a folder of frames.")
        if path.suffix == ".npy":
            return _array(path)[:limit]
        with Image.open(path) as animation:
            frames = itertools.islice(ImageSequence.Iterator(animation), limit)
            return _stacked(path, (np.asarray(as_rgb(frame)) for frame in frames))
    except UnidentifiedImageError:
        if path.is_dir():
            raise UserError(f"{path} has a frame that is no image; write the frames again.") from None
        return _read_with_ffmpeg(path, limit)
    except UserError:
        raise
    except Exception as error:  # PIL raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read ({error}); give another file.") from None


def _in_order(frame: Path) -> list[str | int]:
    """Sorts by the numbers in a name: frame 2 comes before frame 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", frame.name)]


def _stacked(path: Path, frames: Iterable[np.ndarray]) -> np.ndarray:
    frames = list(frames)
    if len(sizes := {frame.shape for frame in frames}) > 1:
        raise UserError(f"{path} has frames of {len(sizes)} different sizes; all frames of a video have one.")
    return np.stack(frames)


def _array(path: Path) -> np.ndarray:
    try:
        frames = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path} is no array of numpy's ({error}); give another file.") from None
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise UserError(
            f"{path} holds {frames.dtype} of shape {frames.shape}; a video is uint8 of frames x height x width x 3."
        )
    return frames


def _read_with_ffmpeg(path: Path, limit: int | None) -> np.ndarray:
    """Every frame that is stored, once, as a stream of PPM images (which carry their size)."""
    # Not imageio_ffmpeg.read_frames: it forks in Python, which jax warns of.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-xerror", "-i", f"file:{path}"]
    count = [] if limit is None else ["-frames:v", str(limit)]
    done = subprocess.run(
        [*command, "-fps_mode", "passthrough", *count, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    header = re.match(rb"P6\n(\d+) (\d+)\n255\n", done.stdout)
    if done.returncode or header is None:
        why = (done.stderr.decode(errors="replace").strip().splitlines() or ["it has no picture"])[-1]
        raise UserError(f"{path} is not a video that ffmpeg can read ({why}); give another file.")
    width, height = int(header[1]), int(header[2])
    images = np.frombuffer(done.stdout, np.uint8).reshape(-1, len(header[0]) + width * height * 3)
    return images[:, len(header[0]) :].reshape(-1, height, width, 3)


def frames_per_second(path: Path | str) -> float | None:
    """As the file says; None where it does not, or lies elsewhere."""
    if "://" in str(path):
        return None
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", f"file:{path}"]
    told = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).stderr.decode(errors="replace")
    found = re.search(r"Video: .* (\d+(?:\.\d+)?) fps", told)
    return float(found[1]) if found else None


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
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", f"file:{path}", "-f", "ffmetadata", "-"]
        text = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL).stdout.decode()
        found = re.search(r"^comment=((?:[^\\\n]|\\.|\\\n)*)$", text, re.MULTILINE)
        comment = re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else None
    return json.loads(comment) if comment else {}
