"""Read videos: the frames that are shown at given times, or every stored frame."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import UnidentifiedImageError

from maxdiffusion.errors import UserError
from maxdiffusion.media.fetch import VIDEO_BYTES, local
from maxdiffusion.media.source import Source, Stored, opened

Fit = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class VideoInfo:
    """Width and height in square pixels, upright; frames per second and number of frames where the file states them."""

    width: int
    height: int
    fps: Fraction | None = None
    frames: int | None = None


@dataclass(frozen=True)
class Clip:
    """Frames read of an input, and where they come from.

    Attributes:
      frames: RGB, or RGBA, as `fit` has made them.
      info: of the input.
      indices: number of the stored frame that each is, from 0.
      timed: whether the stored frames have times.
      still: it is one picture.
      seconds: duration of the input, where it is stated or was read to its end.
      until: end of the last frame read, in seconds; frames, where they have no times.
      sound: whether the input has sound, too.
      colour: how its colours are stored, and what was made of them.
      damage: what is damaged or missing up to there, in words.
    """

    frames: UInt8[np.ndarray, "f h w c"]
    info: VideoInfo
    indices: tuple[int, ...]
    timed: bool
    still: bool
    seconds: Fraction | None
    until: Fraction
    sound: bool
    colour: str
    damage: str


def probe(path: Path | str) -> VideoInfo:
    """Describe what `read_clip` reads, from its first frame and its index.

    Raises:
      UserError: as `read_clip`.
    """
    return read_clip(path, [0]).info


def read_video(path: Path | str, limit: int | None = None) -> UInt8[np.ndarray, "f h w 3"]:
    """The stored frames, at most `limit` of them; see `read_clip`."""
    return read_clip(path, None if limit is None else range(limit)).frames


def times(count: int, fps: Fraction) -> list[Fraction]:
    """The times of the frames of a result, in seconds."""
    return [i / fps for i in range(count)]


def read_clip(
    path: Path | str,
    at: Sequence[Fraction] | Sequence[int] | None = None,
    fit: Fit = lambda frame: frame,
    alpha: bool = False,
) -> Clip:
    """Read frames of a video file, an animation, a .npy array or a folder of frames as RGB, upright, in SDR BT.709.

    One frame is decoded at a time and only those asked for are kept, each converted once.

    Args:
      path: a string may be an http(s) URL of one file.
      at: ascending times in seconds from the start of the first frame, at each of which the frame shown is read; or
        ascending numbers (int) of stored frames; None: all stored frames. Where frames have no times, as many as there
        are times are read from the first on. Where the input ends early, fewer are returned.
      fit: applied to each frame, such as a resizing.
      alpha: read RGBA; opaque, where alpha is not stored.

    Raises:
      UserError: `path` is missing, is none of these, has no picture, or has frames of different sizes.
    """
    with _read_errors(path), opened(local(str(path), VIDEO_BYTES), alpha) as source:
        return _read(source, at, fit)


def stored_times(path: Path | str) -> list[tuple[Fraction, Fraction]]:
    """Start and end of each stored frame in seconds; its index and the next where frames have no times.

    Decodes every frame, keeps none.

    Raises:
      UserError: as `read_clip`.
    """
    with _read_errors(path), opened(local(str(path), VIDEO_BYTES)) as source:
        return [(frame.start, frame.end) for frame in source.frames]


def spread(stored: Sequence[tuple[Fraction, Fraction]], count: int) -> list[int]:
    """Numbers of `count` frames spread over a whole video: the frames shown at equal distances in time.

    Args:
      stored: start and end of each frame, as `stored_times`; of fewer than `count` frames none is taken twice.
      count: number of frames.

    Reference: `VaceVideoProcessor` of Wan2.1, from the start to the middle of the last frame.
    """
    if len(stored) < count:
        return list(range(count))
    last = (stored[-1][0] + stored[-1][1]) / 2
    ends = [end for _, end in stored]
    return [bisect.bisect_left(ends, last * k / max(count - 1, 1)) for k in range(count)]


@contextlib.contextmanager
def _read_errors(path: Path | str) -> Iterator[None]:
    """What goes wrong with a file, as a sentence."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a video file or a folder of frames.") from None
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path} has a frame that is not an image; write the frames again.") from None
    except av.FFmpegError as error:
        raise UserError(f"{path} is not a video that ffmpeg can read ({error.strerror}); give another file.") from None
    except Exception as error:  # PIL raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read ({error}); give another file.") from None


def _read(source: Source, at: Sequence[Fraction] | Sequence[int] | None, fit: Fit) -> Clip:
    frames: list[np.ndarray] = []
    indices: list[int] = []
    sizes: set[tuple[int, ...]] = set()
    until = Fraction(0)
    for index, stored in _selected(source, at):
        if indices and index == indices[-1]:
            frames.append(frames[-1])
        else:
            pixels = stored.pixels()
            sizes.add(pixels.shape)
            frames.append(fit(pixels))
        if len(sizes) > 1:
            raise ValueError("it has frames of different sizes, but all frames of a video must have one")
        indices.append(index)
        until = stored.end
    if not frames:
        raise ValueError("it has no picture that can be decoded")
    ((height, width, _),) = sizes
    return Clip(
        frames=np.stack(frames),
        info=VideoInfo(width, height, source.rate, source.count),
        indices=tuple(indices),
        timed=source.timed,
        still=source.still,
        seconds=source.seconds,
        until=until,
        sound=source.sound,
        colour=source.colour,
        damage=source.damage(),
    )


def _selected(source: Source, at: Sequence[Fraction] | Sequence[int] | None) -> Iterator[tuple[int, Stored]]:
    """(number, frame) of each frame to read."""
    stored = enumerate(source.frames)
    if at is None:
        return stored
    times = [each for each in at if isinstance(each, Fraction)]
    if not times:
        return _numbered(stored, [int(each) for each in at])
    return _shown_at(stored, times, source.tick) if source.timed else _numbered(stored, range(len(times)))


def _numbered(stored: Iterator[tuple[int, Stored]], numbers: Sequence[int]) -> Iterator[tuple[int, Stored]]:
    index, frame = -1, None
    for number in numbers:
        while index < number:
            index, frame = next(stored, (number, None))
        if frame is None:
            return
        yield index, frame


def _shown_at(
    stored: Iterator[tuple[int, Stored]], times: Sequence[Fraction], tick: Fraction
) -> Iterator[tuple[int, Stored]]:
    """At each time the last frame that has started, within half a tick; ends where the last frame does."""
    current, following = next(stored, None), next(stored, None)
    for time in times:
        while following is not None and following[1].start <= time + tick / 2:
            current, following = following, next(stored, None)
        if current is None or (following is None and time + tick / 2 >= current[1].end):
            return
        yield current
