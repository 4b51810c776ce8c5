"""Read videos: files, animations, arrays and folders of frames."""

import contextlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream
from jaxtyping import UInt8
from PIL import ImageSequence, UnidentifiedImageError

from maxdiffusion.errors import UserError
from maxdiffusion.media import kinds
from maxdiffusion.media.fetch import VIDEO_BYTES, as_rgb, local, open_file
from maxdiffusion.media.picture import Unusable

# libswscale's fast path, without these flags, makes all levels 1.0 to 1.4 darker.
ACCURATE = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)


@dataclass(frozen=True)
class VideoInfo:
    """Width and height in pixels, upright; frames per second and number of frames where the file states them."""

    width: int
    height: int
    fps: float | None = None
    frames: int | None = None


def probe(path: Path | str) -> VideoInfo:
    """Describe what `read_video` reads, from its first frame and its index.

    Raises:
      UserError: as `read_video`.
    """
    _, height, width, _ = read_video(path, 1).shape
    with contextlib.suppress(OSError, av.FFmpegError), _opened(local(str(path), VIDEO_BYTES)) as (_, stream):
        if stream is not None:
            rate = stream.average_rate
            return VideoInfo(width, height, float(rate) if rate else None, stream.frames or None)
    return VideoInfo(width, height)


def read_video(path: Path | str, limit: int | None = None) -> UInt8[np.ndarray, "f h w c"]:
    """Read the frames of a video file, an animation, a .npy array or a folder of PNG frames as RGB.

    A string may be an http(s) URL of one file. Equal neighbouring frames of an animation may be one: writers merge
    them. At most `limit` frames are read.

    Raises:
      UserError: `path` is missing, is none of these, is damaged, or has frames of different sizes.
    """
    file = local(str(path), VIDEO_BYTES)
    if not file.exists():
        raise UserError(f"{path} does not exist; give a video file or a folder of frames.")
    try:
        if file.suffix.lower() == ".npy":
            return _array(file)[:limit]
        frames = list(itertools.islice(_frames(file), limit))
    except UnidentifiedImageError:
        raise UserError(f"{path} has a frame that is not an image; write the frames again.") from None
    except av.FFmpegError as error:
        raise UserError(f"{path} is not a video that ffmpeg can read ({error.strerror}); give another file.") from None
    except Exception as error:  # PIL raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read ({error}); give another file.") from None
    if not frames and file.is_dir():
        raise UserError(f"{path} is a folder without PNG frames; give a video file or a folder of frames.")
    if not frames:
        raise UserError(f"{path} is not a video that ffmpeg can read (it has no picture); give another file.")
    if len(sizes := {frame.shape for frame in frames}) > 1:
        raise UserError(f"{path} has frames of {len(sizes)} different sizes; all frames of a video have one.")
    return np.stack(frames)


def _array(file: Path) -> np.ndarray:
    frames = np.load(file, allow_pickle=False)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"it holds {frames.dtype} of shape {frames.shape}, not uint8 of frames x height x width x 3")
    return frames


def _frames(file: Path) -> Iterator[np.ndarray]:
    if file.is_dir():
        for name in sorted(file.glob("*.png"), key=_in_order):
            with open_file(name) as image:
                yield np.asarray(as_rgb(image))
        return
    try:
        with open_file(file) as animation:
            for image in ImageSequence.Iterator(animation):
                yield np.asarray(as_rgb(image))
    except UnidentifiedImageError:
        kind = kinds.kind(file)
        if kind is not None and not kind.readable and kind not in (kinds.VIDEO, kinds.SOUND):
            raise Unusable(f"it is {kind.name}; {kind.advice}") from None
        yield from _decoded(file)


def _in_order(frame: Path) -> list[str | int]:
    """Sorts by the numbers in a name: frame 2 comes before frame 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", frame.name)]


def _decoded(file: Path) -> Iterator[np.ndarray]:
    """Decode every stored frame once.

    By PyAV, not imageio's pyav plugin (measured, imageio 2.38.1): that gives no frame's display matrix, time or error
    flag, and its filters place the chroma of H.264 half a pixel off.
    """
    with _opened(file) as (container, stream):
        for packet in container.demux(stream) if stream else ():
            for frame in packet.decode():
                if packet.is_corrupt or frame.is_corrupt:
                    raise ValueError("it is damaged, or ends early")
                # One thread: PyAV keeps a pool of more for good, for which a process forked later waits.
                yield _upright(frame.to_ndarray(format="rgb24", interpolation=ACCURATE, threads=1), frame)


def _upright(image: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """Turn and mirror it by the display matrix of ffmpeg's `libavutil/display.h`, in quarter turns."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]  # shown at (a x + c y, b x + d y)
    if abs(a) < abs(b):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[InputContainer, VideoStream | None]]:
    """Open a container and its main video stream; a playlist may not open other files."""
    options = {"protocol_whitelist": "none"}
    with open(file, "rb") as source, av.open(source, "r", options=options, metadata_errors="replace") as container:
        stream = container.streams.best("video")
        yield container, stream if isinstance(stream, VideoStream) else None
