"""Write 8-bit frames as a file (or a folder of frames) that is whole or absent."""

import errno
import io
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin

from maxdiffusion.errors import UserError
from maxdiffusion.runtime.atomic import atomic_path
from maxdiffusion.runtime.paths import AnyPath

Frames = UInt8[np.ndarray, "f h w c"]
Metadata = Mapping[str, str]


@dataclass(frozen=True)
class Format:
    """How one format is written: suffix of the name, and encode(chunks, path, fps, metadata)."""

    suffix: str
    encode: Callable[[Iterator[np.ndarray], Path, float, Metadata], None]


def write(
    frames: Frames | Iterable[Frames],
    path: AnyPath,
    fps: float | int,
    fmt: str,
    metadata: Metadata,
    overwrite: bool = False,
) -> None:
    """Write a video to `path` in format `fmt`, a key of FORMATS; nothing is left behind when that fails.

    Args:
        frames: RGB, whole or in chunks of frames; chunks are encoded as they come.
        path: the target, taken as it is; for png a folder, which receives 0000.png, 0001.png, ...
        fps: frames per second.
        fmt: "mp4", "gif", "webp", "png" or "npy".
        metadata: strings to store in the file, all of them as one JSON comment (mp4 `comment`, GIF comment, EXIF
            description, PNG text; npy has no place for them); `prompt`, where given, is also the mp4's title.
        overwrite: replace `path` where it exists.

    Raises:
        UserError: the target exists or cannot be written, the disk is full, or the format cannot hold such a video.
    """
    if fmt not in FORMATS:
        raise UserError(f"output_format={fmt} is not known; choose one of {', '.join(FORMATS)}")
    if overwrite and fmt == "png" and isinstance(path, Path) and path.is_dir():
        _check_replaceable(path)
    chunks = iter([frames] if isinstance(frames, np.ndarray) else frames)
    with atomic_path(path, overwrite) as temporary:
        FORMATS[fmt].encode(chunks, temporary, float(fps), metadata)


def _check_replaceable(folder: Path) -> None:
    """A mistyped save_file with overwrite=true must not cost anyone a folder of something else."""
    others = [entry.name for entry in folder.iterdir() if not re.fullmatch(r"\d{4,}\.png", entry.name)]
    if others:
        raise UserError(
            f"{folder} holds other things than frames ({others[0]}), so that it is not overwritten; give another name"
        )


def _mp4(chunks: Iterator[np.ndarray], path: Path, fps: float, metadata: Metadata) -> None:
    """H.264 in yuv420p with the index first: raw frames go to one ffmpeg process, which is killed if anything fails.

    The colours are converted to and marked as BT.709; without that, ffmpeg converts to BT.601 unmarked and players show
    large videos with a shifted hue.
    """
    first = next(chunks)
    _, height, width, _ = first.shape
    if height % 2 or width % 2:
        raise UserError(
            f"{width} wide x {height} high cannot be an mp4, which needs even sizes; choose output_format=webp"
        )
    notes = path.with_name("metadata")  # a file, because the system bounds the length of an argument
    notes.write_bytes(_ffmetadata(metadata))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-framerate", str(fps), "-i", "pipe:0"]
    command += ["-f", "ffmetadata", "-i", f"file:{notes}", "-map", "0:v", "-map_metadata", "1"]
    command += ["-vf", _TO_BT709, "-c:v", "libx264", "-preset", "medium", "-crf", "17"]
    command += ["-movflags", "+faststart", "-f", "mp4", f"file:{path}"]
    # Its own process group: Ctrl-C reaches us alone, and we end it.
    ffmpeg = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0
    )
    assert ffmpeg.stdin is not None
    try:
        try:
            for chunk in chain([first], chunks):
                ffmpeg.stdin.write(np.ascontiguousarray(chunk).data.cast("B"))
        except BrokenPipeError:
            pass  # it ended early, and says why below
        _, errors = ffmpeg.communicate()
    except BaseException:
        ffmpeg.kill()
        ffmpeg.communicate()
        raise
    if ffmpeg.returncode:
        message = errors.decode(errors="replace").strip()
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number) in message:
                raise OSError(number, os.strerror(number))
        ending = message.splitlines()[-1] if message else f"exit status {ffmpeg.returncode}"
        raise UserError(f"ffmpeg could not encode the mp4 ({ending}); choose output_format=webp or png")


def _ffmetadata(metadata: Metadata) -> bytes:
    """The metadata in ffmpeg's own file format."""
    title = " ".join(metadata.get("prompt", "").split())
    entries = {"title": title, "comment": _comment(metadata)}
    escaped = {key: re.sub(r"([=;#\\\n])", r"\\\1", value) for key, value in entries.items()}
    lines = [f"{key}={value}\n" for key, value in escaped.items() if value]
    return "".join([";FFMETADATA1\n", *lines]).encode(errors="replace")


def _gif(chunks: Iterator[np.ndarray], path: Path, fps: float, metadata: Metadata) -> None:
    """One palette of 256 colours for the whole video: colours do not flicker from frame to frame.

    The palette comes from 16 thousand pixels; Pillow's own, from all pixels of a frame, takes 2 s a frame at 832 x 480.
    """
    if fps > 50:  # browsers play shorter frames at 10 a second
        raise UserError(f"a gif plays at most 50 frames a second, and fps={fps:g}; choose output_format=webp or mp4")
    frames = np.concatenate(list(chunks))
    pixels = frames.reshape(-1, 3)
    sample = np.random.default_rng(0).integers(0, len(pixels), 2**14)
    palette = Image.fromarray(pixels[None, sample]).quantize(256, Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    _save_animation(path, "GIF", images, fps, 10, comment=_comment(metadata).encode())


def _webp(chunks: Iterator[np.ndarray], path: Path, fps: float, metadata: Metadata) -> None:
    if fps > 1000:
        raise UserError(f"a webp plays at most 1000 frames a second, and fps={fps:g}; choose output_format=mp4")
    exif = Image.Exif()
    if metadata:
        exif[_IMAGE_DESCRIPTION] = json.dumps(dict(metadata))  # EXIF text is ASCII: other letters as JSON's escapes
    images = [Image.fromarray(frame) for chunk in chunks for frame in chunk]
    _save_animation(path, "WEBP", images, fps, 1, exif=exif, quality=90)


def _save_animation(path: Path, name: str, images: list[Image.Image], fps: float, tick: int, **options: Any) -> None:
    """`tick` is the format's unit of time in ms; each frame begins at the tick nearest to its time."""
    starts = [round(index * 1000 / fps / tick) * tick for index in range(len(images) + 1)]
    durations = [after - before for before, after in pairwise(starts)]
    buffer = io.BytesIO()  # Pillow's own writing hides the system's error numbers
    images[0].save(buffer, format=name, save_all=True, append_images=images[1:], duration=durations, loop=0, **options)
    path.write_bytes(buffer.getbuffer())


def _png(chunks: Iterator[np.ndarray], path: Path, fps: float, metadata: Metadata) -> None:
    """A folder of frames; the comment is in the first."""
    path.mkdir()
    notes = PngImagePlugin.PngInfo()
    if metadata:
        notes.add_text("Comment", json.dumps(dict(metadata)))
    for index, frame in enumerate(frame for chunk in chunks for frame in chunk):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format="PNG", pnginfo=None if index else notes)
        (path / f"{index:04d}.png").write_bytes(buffer.getbuffer())


def _npy(chunks: Iterator[np.ndarray], path: Path, fps: float, metadata: Metadata) -> None:
    buffer = io.BytesIO()  # np.save to a file hides the system's error numbers
    np.save(buffer, np.concatenate(list(chunks)))
    path.write_bytes(buffer.getbuffer())


def _comment(metadata: Metadata) -> str:
    """Readable JSON; what is no letter (a surrogate from an argument that is no UTF-8) stays as JSON's escape."""
    text = json.dumps(dict(metadata), ensure_ascii=False) if metadata else ""
    return text.encode(errors="backslashreplace").decode()


_IMAGE_DESCRIPTION = 0x010E  # EXIF
_TO_BT709 = "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,setparams=color_primaries=bt709:color_trc=bt709"

FORMATS = {
    "mp4": Format(".mp4", _mp4),
    "gif": Format(".gif", _gif),
    "webp": Format(".webp", _webp),
    "png": Format("", _png),
    "npy": Format(".npy", _npy),
}
