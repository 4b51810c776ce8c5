"""Images from files and URLs. Free of numpy, so that a config is checked with it."""

from __future__ import annotations

import functools
import http.client
import io
import math
import urllib.request

from PIL import Image, ImageOps

from maxdiffusion.errors import UserError

TIMEOUT = 30  # seconds without an answer


def open_image(location: str) -> Image.Image:
    """The whole image, RGB, turned as its camera noted.

    Args:
      location: a path, or an http(s) URL, which is fetched once in a process.

    Raises:
      UserError: it is missing, cannot be fetched, or is damaged or no image.
    """
    try:
        with Image.open(io.BytesIO(download(location)) if "://" in location else location) as image:
            return as_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError(f"{location} does not exist; give an image file.") from None
    except UserError:
        raise
    except Exception as error:  # PIL raises many kinds for a damaged file
        raise UserError(f"{location} is no image that can be read ({error}); give another file.") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """In 8 bits per channel; alpha is dropped, as the reference does.

    Raises:
      ValueError: its pixels are numbers of 32 bits, of which none is known to be white.
    """
    if image.mode.startswith("I;16"):  # Pillow would cut all above 255
        image = image.convert("I").point(lambda value: value / 257)
    elif image.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits, of which none is known to be white")
    return image.convert("RGB")


@functools.lru_cache(maxsize=64)
def download(url: str) -> bytes:
    """What an http(s) URL gives, fetched once in a process.

    Raises:
      UserError: it is no such URL, or cannot be fetched.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url} is no http or https URL; give one, or download the file and give its path.")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "maxdiffusion"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError, HTTPError, timeouts are OSErrors
        raise UserError(f"{url} cannot be fetched ({error}); download the file and give its path.") from None


def size_within(area: int, image: tuple[int, int], step: int) -> tuple[int, int]:
    """(width, height) in the proportions of an image of that (width, height), in multiples of `step`, at most `area`.

    Reference: the example of `diffusers.WanImageToVideoPipeline`.
    """
    aspect = image[1] / image[0]
    height, width = (round(math.sqrt(area * ratio)) // step * step for ratio in (aspect, 1 / aspect))
    if not min(width, height):
        raise UserError(
            f"An image of {image[0]} x {image[1]} pixels is too narrow for a video of its proportions; "
            "crop it, or give width and height."
        )
    return width, height
