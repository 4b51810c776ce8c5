"""Write 8-bit frames to a file or a folder of frames, which is whole or absent."""

import contextlib
import errno
import functools
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import av
import imageio.v3 as iio
import numpy as np
from av.filter import Graph
from jaxtyping import UInt8
from PIL import ExifTags, Image, PngImagePlugin

from maxdiffusion.errors import UserError
from maxdiffusion.media.colour import ACCURATE
from maxdiffusion.media.sound import Sound, add
from maxdiffusion.runtime.atomic import atomic_path
from maxdiffusion.runtime.paths import AnyPath

log = logging.getLogger(__name__)

Frames = UInt8[np.ndarray, "f h w c"]
Metadata = Mapping[str, str]
Encode = Callable[[Iterator[np.ndarray], Path, Fraction, Metadata], None]


def write(
    frames: Frames | Iterable[Frames],
    path: AnyPath,
    fps: Fraction | float | int,
    fmt: str,
    metadata: Metadata,
    overwrite: bool = False,
    sound: Sound | None = None,
) -> None:
    """Write a video, whole or in chunks, to `path`: see `writing`."""
    with writing(path, fps, fmt, metadata, overwrite, sound) as encode:
        encode(iter([frames] if isinstance(frames, np.ndarray) else frames))


@contextlib.contextmanager
def writing(
    path: AnyPath,
    fps: Fraction | float | int,
    fmt: str,
    metadata: Metadata,
    overwrite: bool = False,
    sound: Sound | None = None,
) -> Iterator[Callable[[Iterator[Frames]], None]]:
    """Give the function that encodes a video in format `fmt`, a key of FORMATS, in chunks of RGB frames as they come.

    After the block, which calls it once, the file has its name; nothing is left behind when the block fails.

    Args:
        path: the target, taken as it is; for png of several frames a folder, which receives 0000.png, 0001.png, ...
        fps: frames per second; mp4 keeps a Fraction exactly.
        fmt: a key of FORMATS.
        metadata: strings to store in the file, all of them as one JSON comment (mp4 `comment`, GIF comment, EXIF
            description, PNG text; npy has no place for them, and jpg for 64 KiB); `prompt`, where given, is also the
            mp4's title.
        overwrite: replace `path` where it exists.
        sound: to put beside the pictures; mp4 alone can hold it.

    Raises:
        ValueError: `sound` with another format.
        UserError: the target exists or cannot be written, the disk is full, or the format cannot hold such a video.
    """
    if fmt not in FORMATS:
        raise UserError(f"unknown output_format={fmt}; choose one of {', '.join(FORMATS)}")
    if overwrite and fmt == "png" and isinstance(path, Path) and path.is_dir():
        check_replaceable(path)
    if sound is not None and fmt != "mp4":
        raise ValueError(f"{fmt} holds no sound")
    encode: Encode = FORMATS[fmt] if sound is None else functools.partial(_mp4, sound=sound)
    with atomic_path(path, overwrite) as temporary:
        yield lambda chunks: encode(chunks, temporary, Fraction(fps).limit_denominator(65535), metadata)


def check_format(fmt: str) -> None:
    """Checks that this machine can write the format.

    Raises:
      UserError: ffmpeg's libraries, which come with the package av, were built without the encoder of mp4.
    """
    if fmt == "mp4" and "libx264" not in av.codecs_available:
        raise UserError(
            f"output_format=mp4 needs the encoder libx264, which the ffmpeg of av {av.__version__} here lacks; install "
            "av from its wheel (pip install --force-reinstall --only-binary av av), or choose output_format=webp or png"
        )


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder of other files, which a mistyped save_file with overwrite=true may name.

    Raises:
      UserError: the folder holds other things than frames.
    """
    others = [entry.name for entry in folder.iterdir() if not re.fullmatch(r"\d{4,}\.png", entry.name)]
    if others:
        raise UserError(
            f"{folder} holds other things than frames ({others[0]}) and is not overwritten; give another name"
        )


def _mp4(
    chunks: Iterator[np.ndarray], path: Path, fps: Fraction, metadata: Metadata, sound: Sound | None = None
) -> None:
    """H.264 in yuv420p with the index first, so that it plays while it loads.

    The colours are converted to BT.709 and marked so, chroma at the left, where unmarked H.264 has it. By PyAV,
    not imageio's pyav plugin: that converts to BT.601 unmarked, and takes neither filters nor options of the codec
    (measured, imageio 2.38.1).
    """
    first = next(chunks)
    _, height, width, _ = first.shape
    if height % 2 or width % 2:
        raise UserError(
            f"{width} wide x {height} high cannot be an mp4, which needs even sizes; choose output_format=webp"
        )
    to_yuv = _to_bt709(width, height, fps)
    title = " ".join(metadata.get("prompt", "").split()).encode(errors="replace").decode()
    try:
        with av.open(f"file:{path}", "w", "mp4", options=_CONTAINER) as container:
            notes = {"title": title, "comment": _comment(metadata)}
            container.metadata.update({key: value for key, value in notes.items() if value})
            stream = container.add_stream("libx264", fps, options=_CODEC)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            if sound is not None:
                add(container, sound)
            for index, pixels in enumerate(frame for chunk in chain([first], chunks) for frame in chunk):
                frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
                frame.pts, frame.time_base = index, 1 / fps
                to_yuv.vpush(frame)
                container.mux(stream.encode(to_yuv.vpull()))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"ffmpeg could not encode the mp4 ({error.strerror}); choose output_format=webp or png"
        ) from None


def _to_bt709(width: int, height: int, rate: Fraction) -> Graph:
    """A filter from RGB to limited-range yuv420p, chroma at the left; PyAV's `reformat` centres it on two columns."""
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate)
    scale = graph.add("scale", f"out_color_matrix=bt709:out_range=tv:out_chroma_loc=left:flags={int(ACCURATE)}")
    graph.link_nodes(source, scale, graph.add("format", "yuv420p"), graph.add("buffersink")).configure()
    return graph


def _gif(chunks: Iterator[np.ndarray], path: Path, fps: Fraction, metadata: Metadata) -> None:
    """One palette of 256 colours for the whole video: colours do not flicker from frame to frame.

    The palette comes from 16 thousand pixels; Pillow's own, from all pixels of a frame, takes 2 s a frame at 832 x 480.
    """
    if fps > 50:  # browsers play shorter frames at 10 a second
        raise UserError(
            f"a gif plays at most 50 frames a second, and fps={float(fps):g}; choose output_format=webp or mp4"
        )
    frames = np.concatenate(list(chunks))
    pixels = frames.reshape(-1, 3)
    sample = np.random.default_rng(0).integers(0, len(pixels), 2**14)
    palette = Image.fromarray(pixels[None, sample]).quantize(256, Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options = {"mode": "P", "palette": bytes(palette.getpalette() or ()), "comment": _comment(metadata).encode()}
    _save(path, np.stack([np.asarray(image) for image in images]), ".gif", **_timing(len(images), fps, 10), **options)


def _webp(chunks: Iterator[np.ndarray], path: Path, fps: Fraction, metadata: Metadata) -> None:
    if fps > 1000:
        raise UserError(f"a webp plays at most 1000 frames a second, and fps={float(fps):g}; choose output_format=mp4")
    frames = np.concatenate(list(chunks))
    _save(path, frames, ".webp", **_timing(len(frames), fps, 1), exif=_exif(metadata), quality=90)


def _jpg(chunks: Iterator[np.ndarray], path: Path, fps: Fraction, metadata: Metadata) -> None:
    """One picture, its chroma not subsampled."""
    (frame,) = np.concatenate(list(chunks))
    exif = _exif(metadata)
    if len(exif.tobytes()) > 0xFFFD:
        log.info("%s: its metadata do not fit into a jpg, and are in the record alone", path.name)
        exif = Image.Exif()
    _save(path, frame, ".jpg", exif=exif, quality=95, subsampling=0)


def _exif(metadata: Metadata) -> Image.Exif:
    exif = Image.Exif()
    if metadata:  # EXIF text is ASCII: other letters as JSON's escapes
        exif[ExifTags.Base.ImageDescription] = json.dumps(dict(metadata))
    return exif


def _timing(count: int, fps: Fraction, tick: int) -> dict[str, Any]:
    """Pillow's options for an endless animation whose frames begin at the nearest multiples of `tick` ms."""
    starts = [round(index * 1000 / fps / tick) * tick for index in range(count + 1)]
    return {"save_all": True, "loop": 0, "duration": [after - before for before, after in pairwise(starts)]}


def _png(chunks: Iterator[np.ndarray], path: Path, fps: Fraction, metadata: Metadata) -> None:
    """One frame as a picture, several as a folder of them; the comment is in the first."""
    frames = (frame for chunk in chunks for frame in chunk)
    first, second = next(frames), next(frames, None)
    if second is None:
        write_frame(first, path, metadata)
        return
    path.mkdir()
    for index, frame in enumerate(chain([first, second], frames)):
        write_frame(frame, path / f"{index:04d}.png", {} if index else metadata)


def write_frame(frame: UInt8[np.ndarray, "h w c"], path: Path, metadata: Metadata) -> None:
    """Write one frame as a PNG; the strings of `metadata`, if any, as one comment."""
    notes = PngImagePlugin.PngInfo()
    if metadata:
        notes.add_text("Comment", json.dumps(dict(metadata)))
    _save(path, frame, ".png", pnginfo=notes)


def _save(path: Path, pixels: np.ndarray, extension: str, **options: Any) -> None:
    """Encode in memory, because Pillow's own writing hides the system's error numbers."""
    path.write_bytes(iio.imwrite("<bytes>", pixels, extension=extension, plugin="pillow", **options))


def _npy(chunks: Iterator[np.ndarray], path: Path, fps: Fraction, metadata: Metadata) -> None:
    buffer = io.BytesIO()  # np.save to a file hides the system's error numbers
    np.save(buffer, np.concatenate(list(chunks)))
    path.write_bytes(buffer.getvalue())  # getbuffer: Python 3.12.1 crashes when it collects one after an error


def _comment(metadata: Metadata) -> str:
    """Readable JSON; surrogates (from an argument that is not UTF-8) stay escaped."""
    text = json.dumps(dict(metadata), ensure_ascii=False) if metadata else ""
    return text.encode(errors="backslashreplace").decode()


_BT709 = dict.fromkeys(("colorspace", "color_primaries", "color_trc"), "bt709")
_CONTAINER = {"movflags": "faststart", "max_interleave_delta": "0"}  # the sound, given first, waits for its pictures
_CODEC = {"preset": "medium", "crf": "17", "color_range": "tv", **_BT709}

# Format -> encode(chunks, path, fps, metadata).
FORMATS: Mapping[str, Encode] = {
    "mp4": _mp4,
    "gif": _gif,
    "webp": _webp,
    "png": _png,
    "jpg": _jpg,
    "npy": _npy,
}
