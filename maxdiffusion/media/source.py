"""The stored frames of a video file, an animation, an array or a folder of frames, with the times of their display."""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

from maxdiffusion.media import colour, kinds
from maxdiffusion.media.fetch import open_file
from maxdiffusion.media.picture import Unusable, convert

ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
# Suffix of a frame in a folder -> its format.
FRAMES: Mapping[str, str] = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
    ".heic": "HEIC",
    ".heif": "HEIC",
}


class Stored(NamedTuple):
    """A stored frame: shown from `start` to `end`, seconds since the first is shown, or its index where it has no time.

    `pixels` converts it to upright RGB, or RGBA, with square pixels, h w c uint8.
    """

    start: Fraction
    end: Fraction
    pixels: Callable[[], np.ndarray]


@dataclass
class Source:
    """An opened input. Its duration, colours and damage may be known only once frames are read.

    Attributes:
      alpha: its frames are read as RGBA.
      frames: in the order of display.
      timed: whether they have times; those of a folder, an array or one picture have none.
      still: it is one picture.
      rate: mean frames per second, where stated.
      seconds: duration, where stated.
      count: number of frames, where stated.
      tick: unit of its times in seconds, to which they are rounded.
      sound: it has sound, too.
      colour: how its colours are stored, and what is made of them.
      damaged: packets and frames that cannot be decoded without fault.
      gaps: number of frames by the time since the one before began, in quarters of a frame of the mean rate.
      missing: seconds by which it is shorter than stated.
    """

    alpha: bool
    frames: Iterator[Stored] = field(default_factory=lambda: iter(()))
    timed: bool = False
    still: bool = False
    rate: Fraction | None = None
    seconds: Fraction | None = None
    count: int | None = None
    tick: Fraction = Fraction(0)
    sound: bool = False
    colour: str = "RGB"
    damaged: int = 0
    gaps: Counter[int] = field(default_factory=Counter)
    missing: Fraction = Fraction(0)

    def damage(self) -> str:
        """What is wrong as far as it was read, in words."""
        holes = {quarters // 4 - 1: number for quarters, number in self.gaps.items() if quarters != 4}
        even = all(quarters and quarters % 4 == 0 for quarters in self.gaps)
        if not even or 10 * sum(holes.values()) > self.gaps.total():  # it has no constant rate
            holes = {}
        count = self.damaged + sum(lost * number for lost, number in holes.items())
        words = [f"{count} of its frames are damaged or missing"] if count else []
        words += [f"{float(self.missing):.3g} s of it are missing"] if self.missing else []
        return " and ".join(words)


@contextlib.contextmanager
def opened(file: Path, alpha: bool = False) -> Iterator[Source]:
    """Open what the path names, to read RGB or, with `alpha`, RGBA.

    Raises:
      OSError, ValueError, av.FFmpegError, or another of Pillow's: it is none of these, or has no picture.
    """
    if file.is_dir():
        yield _folder(file, alpha)
    elif file.suffix.lower() == ".npy":
        yield _array(file, alpha)
    else:
        try:
            image = open_file(file)
        except UnidentifiedImageError:
            kind = kinds.kind(file)
            if kind is not None and not kind.readable and kind not in (kinds.VIDEO, kinds.SOUND):
                raise Unusable(f"it is {kind.name}; {kind.advice}") from None
            with _opened(file) as (container, stream):
                yield _container(container, stream, alpha)
            return
        with image:
            yield _animation(image, alpha)


# ---- without times


def _array(file: Path, alpha: bool) -> Source:
    frames = np.load(file, mmap_mode="r", allow_pickle=False)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"it holds {frames.dtype} of shape {frames.shape}, not uint8 of frames x height x width x 3")
    pixels: Callable[[Any], np.ndarray] = _with_alpha if alpha else np.array
    return Source(alpha, _counted(functools.partial(pixels, frame) for frame in frames), count=len(frames))


def _folder(folder: Path, alpha: bool) -> Source:
    names = sorted((name for name in folder.iterdir() if _is_frame(name)), key=_in_order)
    kinds = Counter(FRAMES[name.suffix.lower()] for name in names)
    if not names:
        raise ValueError(f"it is a folder without frames ({', '.join(FRAMES)})")
    if len(kinds) > 1:
        held = " and ".join(f"{number} {kind}" for kind, number in kinds.items())
        raise ValueError(f"it is a folder of {held} files; keep frames of one kind in it")
    source = Source(alpha, count=len(names))
    source.frames = _counted(functools.partial(_picture, name, source) for name in names)
    return source


def _is_frame(name: Path) -> bool:
    return name.suffix.lower() in FRAMES and not name.name.startswith(".")


def _in_order(frame: Path) -> list[str | int]:
    """Sorts by the numbers in a name: frame 2 comes before frame 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", frame.name)]


def _picture(file: Path, source: Source) -> np.ndarray:
    with open_file(file) as image:
        return _converted(image, source)


def _converted(image: Image.Image, source: Source) -> np.ndarray:
    picture = convert(image)
    source.colour = picture.colour or source.colour
    return _with_alpha(picture.rgb, picture.alpha) if source.alpha else np.asarray(picture.rgb)


def _with_alpha(rgb: Any, alpha: Any = None) -> np.ndarray:
    """RGBA of two images; opaque without the second."""
    return np.dstack([rgb, np.full(np.shape(rgb)[:2], 255, np.uint8) if alpha is None else alpha])


def _counted(pixels: Iterator[Callable[[], np.ndarray]]) -> Iterator[Stored]:
    for i, each in enumerate(pixels):
        yield Stored(Fraction(i), Fraction(i + 1), each)


# ---- animations


def _animation(image: Any, alpha: bool) -> Source:
    """An image that Pillow has opened: an animation, the pages of a TIFF, or one picture."""
    pages = getattr(image, "n_frames", 1) if image.format in (*ANIMATED, "TIFF") else 1
    first = int(getattr(image, "default_image", False) and pages > 1)  # of an APNG: for programs that show no other
    source = Source(alpha, still=pages - first == 1, timed=image.format in ANIMATED and pages - first > 1)
    source.count, source.tick = pages - first, Fraction(1, 100 if image.format == "GIF" else 1000) * source.timed
    source.frames = _shown(image, range(first, pages), source)
    return source


def _shown(image: Any, pages: range, source: Source) -> Iterator[Stored]:
    start = Fraction(0)
    for i, page in enumerate(pages):
        try:
            image.seek(page)
            image.load()  # a WebP has its duration from now on
            pixels = _converted(image, source)
        except Exception:  # Pillow raises many kinds
            if not i:
                raise
            source.damaged += len(pages) - i
            return
        length = _delay(image) if source.timed else Fraction(1)
        yield Stored(start, start + length, functools.partial(np.asarray, pixels))
        start += length
    source.seconds = start if source.timed else None


def _delay(image: Any) -> Fraction:
    """Seconds for which a frame is shown; browsers show one of no duration, and of 10 ms in a GIF, for 100 ms."""
    ms = Fraction(image.info.get("duration") or 0)
    return Fraction(1, 10) if ms <= (10 if image.format == "GIF" else 0) else ms / 1000


# ---- videos


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a container and its main video stream; a playlist may not open other files."""
    options = {"protocol_whitelist": "none"}
    with open(file, "rb") as data, av.open(data, "r", options=options, metadata_errors="replace") as container:
        yield container, _pictures(container)


def _pictures(container: InputContainer) -> VideoStream:
    """The main stream of pictures that is not a cover.

    Raises:
      ValueError: there is none.
    """
    covers = [each for each in container.streams.video if each.disposition & Disposition.attached_pic]
    streams: list[Any] = [container.streams.best("video"), *container.streams.video]
    streams = [each for each in streams if isinstance(each, VideoStream) and each not in covers]
    if streams:
        return streams[0]
    if not container.streams.audio:
        raise ValueError("it has no picture")
    seconds = f", {container.duration / av.time_base:.3g} s" if container.duration else ""
    cover = " and a cover" if covers else ""
    raise ValueError(f"it is sound ({container.streams.audio[0].codec_context.name}{seconds}){cover} without a video")


def _container(container: InputContainer, stream: VideoStream, alpha: bool) -> Source:
    rate, base = stream.average_rate or stream.guessed_rate, stream.time_base or Fraction(1, 1000)
    seconds = stream.duration * base if stream.duration else None
    if seconds is None and container.duration:
        seconds = Fraction(container.duration, av.time_base)
    sound = bool(container.streams.audio)
    source = Source(alpha, timed=True, rate=rate, seconds=seconds, count=stream.frames or None, tick=base, sound=sound)
    source.frames = _decoded(container, stream, source)
    return source


def _decoded(container: InputContainer, stream: VideoStream, source: Source) -> Iterator[Stored]:
    """Decode every stored frame once.

    By PyAV, not imageio's pyav plugin (measured, imageio 2.38.1): that gives no frame's display matrix, time or error
    flag, and its filters place the chroma of H.264 half a pixel off.
    """
    usual = 1 / source.rate if source.rate else Fraction(1, 25)
    wide = stream.sample_aspect_ratio or Fraction(1)
    begin, last = None, Stored(Fraction(0), Fraction(0), functools.partial(np.empty, 0))
    count = 0
    for count, frame in enumerate(_shown_frames(container, stream, source), 1):
        base = frame.time_base or source.tick
        at = None if frame.pts is None else frame.pts * base
        begin = at if begin is None else begin
        # Damage may leave a frame without a time, or with one before its predecessor's.
        start = last.end if at is None or begin is None else max(at - begin, last.start)
        end = start + (frame.duration * base if frame.duration else usual)
        if count == 1:
            source.colour = colour.describe(frame)
        else:
            source.gaps[round(4 * (start - last.start) / usual)] += 1
        last = Stored(start, end, functools.partial(_square_pixels, frame, wide, source.alpha))
        yield last
    if source.seconds and source.seconds - last.end > 1.5 * usual:
        source.missing = source.seconds - last.end
    source.seconds, source.count = last.end, source.count or count


def _shown_frames(container: InputContainer, stream: VideoStream, source: Source) -> Iterator[VideoFrame]:
    """Frames as players show them: with faults, and without what cannot be decoded."""
    packets = container.demux(stream)
    ended = False
    while not ended:
        frames: list[VideoFrame] = []
        try:
            packet = next(packets, None)
            ended = packet is None
            frames = [] if packet is None else packet.decode()
            fault = packet is not None and packet.is_corrupt
        except av.FFmpegError:
            fault = True
        source.damaged += fault or any(frame.is_corrupt for frame in frames)
        yield from frames


def _square_pixels(frame: VideoFrame, shape: Fraction, alpha: bool) -> np.ndarray:
    """Its picture upright and, where its pixels are `shape` times as wide as high, resampled to square ones."""
    width = max(round(frame.width * shape), 1)
    image = colour.to_rgb(frame, width)
    return _upright(_with_alpha(image, colour.alpha(frame, width)) if alpha else image, frame)


def _upright(image: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """Turn and mirror it by the display matrix of ffmpeg's `libavutil/display.h`, in quarter turns."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]  # shown at (a x + c y, b x + d y)
    if abs(a) < abs(b):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
