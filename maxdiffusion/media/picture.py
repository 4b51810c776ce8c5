"""A picture as the networks see it: upright, in sRGB, 8 bits per channel. Imports no numpy."""

from __future__ import annotations

import dataclasses
import functools
import io

from PIL import Image, ImageCms, ImageOps

# Modes of the images that a profile of each colour space describes; sRGB profiles are also in grey JPEGs.
_MODES = {"RGB": ("RGB", "L"), "GRAY": ("L",), "CMYK": ("CMYK",)}
_UNUSABLE = (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError)


class Unusable(ValueError):
    """An image whose content is no picture that can be used. The message begins with "it" and says what to do."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An opened image and what was converted.

    Attributes:
      rgb: its colours in sRGB, upright, without alpha.
      alpha: its opacity (mode L), where not every pixel is opaque.
      colour: how its colours became sRGB, for log and record; empty where they were.
    """

    rgb: Image.Image
    alpha: Image.Image | None = None
    colour: str = ""

    def on(self, ground: str) -> Image.Image:
        """The picture on a ground of that colour, such as "white"."""
        if self.alpha is None:
            return self.rgb
        return Image.composite(self.rgb, Image.new("RGB", self.rgb.size, ground), self.alpha)


def convert(image: Image.Image) -> Picture:
    """Turn an image by its EXIF orientation and convert its colours from its ICC profile to sRGB, as browsers do.

    Args:
      image: an image of PIL, or the current frame of an animation.

    Raises:
      Unusable: its pixels are numbers of 32 bits, whose value for white is unknown.
    """
    image = _eight_bits(ImageOps.exif_transpose(image))
    profile, alpha = image.info.get("icc_profile") or b"", None
    mode = {"LA": "L"}.get(image.mode, image.mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = image.convert(mode if mode in ("L", "CMYK", "LAB") else "RGB")
    rgb, colour = _to_srgb(image, profile)
    return Picture(rgb, None if alpha is None or alpha.getextrema() == (255, 255) else alpha, colour)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut all above 255
        profile = image.info.get("icc_profile")
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
        image.info = {"icc_profile": profile}
    elif image.mode in ("I", "F"):
        raise Unusable(
            "its pixels are numbers of 32 bits, whose value for white is unknown; save it with 8 or 16 bits per channel"
        )
    return image.convert("L") if image.mode == "1" else image


def _to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """The image in sRGB, and how it was converted."""
    if not profile and image.mode != "LAB":
        return image.convert("RGB"), "CMYK without a profile, made RGB" if image.mode == "CMYK" else ""
    try:
        name, transform = _transform(profile, image.mode)
        if transform is None:
            return image.convert("RGB"), ""
        converted = ImageCms.applyTransform(image.convert(transform.input_mode), transform)
    except _UNUSABLE as error:
        why = str(error).strip("'\"") or "damaged"
        return image.convert("RGB"), f"its colour profile cannot be used ({why}) and is ignored"
    assert converted is not None  # only in place there is none
    return converted, f"{name} made sRGB"


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The name of a profile and the transform of images of that mode from it to sRGB; None where it is sRGB itself.

    Perceptual: a profile of primaries and curves alone, which has no such table, is converted colorimetrically.
    """
    if mode == "LAB":
        source, name = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "CIELAB"
    else:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        space = source.profile.xcolor_space.strip()
        if mode not in _MODES.get(space, ()):
            raise ValueError(f"{name} is for {space}, and the image is {mode}")
        mode = {"RGB": "RGB", "GRAY": "L"}.get(space, mode)
    if name.startswith("sRGB"):
        return name, None
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return name, ImageCms.buildTransform(source, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
