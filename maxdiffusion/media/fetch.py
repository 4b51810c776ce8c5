"""Images from files and URLs. Imports no numpy: checks of a config use it."""

from __future__ import annotations

import functools
import http.client
import tempfile
import threading
import urllib.parse
import urllib.request
from concurrent.futures import Future
from pathlib import Path
from typing import IO, NoReturn

from PIL import Image, ImageOps, UnidentifiedImageError

from maxdiffusion.errors import UserError

TIMEOUT = 30  # seconds without an answer
DEADLINE = 600  # seconds for a whole file
IMAGE_BYTES, VIDEO_BYTES = 64 * 2**20, 4 * 2**30  # at most
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def open_image(location: str) -> Image.Image:
    """Read an image as RGB, rotated by its EXIF orientation.

    Args:
      location: a path, or an http(s) URL, which is fetched once in a process.

    Raises:
      UserError: it is missing, cannot be fetched, is damaged, or is not an image of FORMATS.
    """
    try:
        with open_file(local(location, IMAGE_BYTES)) as image:
            return as_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError(f"{location} does not exist; give an image file.") from None
    except UserError:
        raise
    except Exception as error:  # PIL raises many kinds for a damaged file
        why = f"it is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{location} cannot be read as an image ({why}); give another file.") from None


def open_file(file: Path) -> Image.Image:
    """Open an image or an animation of one of FORMATS.

    No other format is tried, because Pillow gives PostScript to Ghostscript. This is why images are not read by
    imageio, whose pillow plugin tries every format; it also mirrors grey images along the wrong axis (measured,
    imageio 2.38.1).

    Raises:
      UnidentifiedImageError: it has another format.
    """
    return Image.open(file, formats=FORMATS)


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8 bits per channel and drop alpha, as the reference does.

    Raises:
      ValueError: its pixels are numbers of 32 bits, whose value for white is unknown.
    """
    if image.mode.startswith("I;16"):  # Pillow would cut all above 255
        image = image.convert("I").point(lambda value: value / 257)
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits, whose value for white is unknown")
    return image.convert("RGB")


def local(location: str, limit: int) -> Path:
    """The path of a local file: `location` itself, or of an http(s) URL the copy that is fetched once in a process.

    Raises:
      UserError: it is another URL, cannot be fetched, has more than `limit` bytes or takes longer than DEADLINE.
    """
    return Path(_download(location, limit).name) if "://" in location else Path(location)


@functools.lru_cache(maxsize=64)
def _download(url: str, limit: int) -> IO[bytes]:
    if not url.startswith(("http://", "https://")):
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
