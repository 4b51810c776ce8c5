"""Images from files and URLs. Imports no numpy: checks of a config use it."""

from __future__ import annotations

import functools
import http.client
import logging
import tempfile
import threading
import urllib.parse
import urllib.request
from concurrent.futures import Future
from pathlib import Path
from typing import IO, NoReturn

from PIL import Image, JpegImagePlugin, UnidentifiedImageError, features

from maxdiffusion.errors import UserError
from maxdiffusion.media import kinds
from maxdiffusion.media.picture import Picture, Unusable, convert
from maxdiffusion.runtime import paths

log = logging.getLogger(__name__)

TIMEOUT = 30  # seconds without an answer
DEADLINE = 600  # seconds for a whole file
IMAGE_BYTES, VIDEO_BYTES = 64 * 2**20, 4 * 2**30  # at most
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))


def open_picture(location: str) -> Picture:
    """Read an image upright, in sRGB, with 8 bits per channel.

    Args:
      location: a path, or an http(s) URL, which is fetched once in a process.

    Raises:
      UserError: it is missing, cannot be fetched, is damaged, or is neither an image of FORMATS nor a HEIC photo.
    """
    file = local(location, IMAGE_BYTES)
    try:
        with open_file(file) as image:
            return convert(image)
    except FileNotFoundError:
        raise UserError(f"{location} does not exist; give an image file.") from None
    except Unusable as error:
        raise UserError(f"{location} cannot be read as an image ({error}).") from None
    except Exception as error:  # PIL raises many kinds for a damaged file
        raise UserError(f"{location} {_fault(file, error)}") from None


def open_image(location: str, ground: str | None = None) -> Image.Image:
    """`open_picture` as RGB, on a ground of that colour; None drops alpha, as the reference does.

    What was converted is logged and is the result's `info`: `colour` and `alpha`, each where it applies.

    Raises:
      UserError: as `open_picture`.
    """
    picture = open_picture(location)
    image = picture.rgb if ground is None else picture.on(ground)
    image.info = {"colour": picture.colour} if picture.colour else {}
    if picture.alpha is not None:
        shown = f"stands on {ground}" if ground else "shows the colours stored below it"
        image.info["alpha"] = f"what is transparent {shown}"
    for change in image.info.values():
        log.info("image %s: %s", location, change)
    return image


def open_file(file: Path) -> Image.Image:
    """Open an image or an animation of one of FORMATS, or a HEIC photo.

    No other format is tried, because Pillow gives PostScript to Ghostscript. This is why images are not read by
    imageio, whose pillow plugin tries every format; it also mirrors grey images along the wrong axis (measured,
    imageio 2.38.1).

    Raises:
      UnidentifiedImageError: it has another format.
      Unusable: it is a camera's raw file, whose thumbnail alone would be read, or a HEIC photo, and the package that
        reads those is absent.
    """
    kind = None if file.is_dir() else kinds.kind(file)
    if kind is kinds.RAW:
        raise Unusable(f"it is {kind.name}; {kind.advice}")
    if kind is not kinds.HEIC:
        image = Image.open(file, formats=FORMATS)
        # A JPEG that holds further pictures (depth, gain map): the photo is the first, not an animation of all.
        return JpegImagePlugin.JpegImageFile(file) if image.format == "MPO" else image
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise Unusable(f"it is {kind.name}; pip install 'maxdiffusion[heif]', or {kind.advice}") from None
    register_heif_opener()
    return Image.open(file, formats=["HEIF"])


def _fault(file: Path, error: Exception) -> str:
    """Why a file cannot be read as an image, and what to do: the end of a sentence."""
    if file.is_dir():
        return "is a folder; give an image file."
    if isinstance(error, OSError) and error.errno:  # of the operating system
        return f"cannot be read ({error.strerror}); give another file."
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; make it smaller."
    kind = kinds.kind(file)
    if isinstance(error, UnidentifiedImageError) and kind is None:
        return f"cannot be read as an image (it is none of {', '.join(FORMATS)}); give another file."
    if kind is not None and not kind.readable and isinstance(error, UnidentifiedImageError):
        return f"is {kind.name}, which is not read as an image; {kind.advice}."
    return f"is {kind.name if kind else 'an image'} that is damaged or not whole; save or download it again."


def local(location: str, limit: int) -> Path:
    """The path of a local file: `location` itself, or of an http(s) URL the copy that is fetched once in a process.

    Raises:
      UserError: it is a pipe or another URL, cannot be fetched, has more than `limit` bytes or takes longer than
        DEADLINE.
    """
    if "://" in location:
        return Path(_download(location, limit).name)
    paths.check_file(Path(location), location)
    return Path(location)


@functools.lru_cache(maxsize=64)
def _download(url: str, limit: int) -> IO[bytes]:
    if not paths.is_url(url):
        raise UserError(f"{url} is not an http or https URL; give one, or download the file and give its path.")
    copy: Future[IO[bytes]] = Future()
    # In a thread, because no timeout of a socket ends a header that comes a byte a second.
    threading.Thread(target=_fetch, args=(url, limit, copy), daemon=True).start()
    try:
        return copy.result(DEADLINE)
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError, HTTPError, timeouts are OSErrors
        why = str(error) or f"it is not complete after {DEADLINE} seconds"
        raise UserError(f"{url} cannot be fetched ({why}); download the file and give its path.") from None


def _fetch(url: str, limit: int, copy: Future[IO[bytes]]) -> None:
    try:
        suffix = Path(urllib.parse.urlsplit(url).path).suffix
        file = tempfile.NamedTemporaryFile(suffix=suffix)  # noqa: SIM115 (removed when the cache forgets it)
        request = urllib.request.Request(url, headers={"User-Agent": "maxdiffusion"})
        with urllib.request.build_opener(_NoFTP).open(request, timeout=TIMEOUT) as answer:
            while chunk := answer.read1(2**20):
                file.write(chunk)
                if file.tell() > limit:
                    raise OSError(f"it is larger than {limit / 2**20:g} MiB")
            if answer.length:
                raise http.client.IncompleteRead(b"", answer.length)
        file.flush()
        copy.set_result(file)
    except BaseException as error:
        copy.set_exception(error)


class _NoFTP(urllib.request.FTPHandler):
    """Replaces the handler that would follow a redirect to ftp."""

    def ftp_open(self, request: urllib.request.Request) -> NoReturn:
        raise OSError("it leads to ftp")
