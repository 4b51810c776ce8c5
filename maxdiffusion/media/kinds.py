"""What a file is, by its first bytes: for the sentence about one that cannot be read."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a file is ("a PDF document") and what to do; `readable` by this package if it is whole."""

    name: str
    advice: str
    readable: bool = False


def _picture(name: str) -> Kind:
    return Kind(name, "export it as PNG or JPEG")


def _readable(name: str) -> Kind:
    return Kind(name, "save or download it again", readable=True)


HEIC, AVIF = _picture("a HEIC photo"), _picture("an AVIF image")
RAW = Kind("a camera's raw file", "develop it and export it as PNG or JPEG")
VIDEO = Kind("a video", "give one of its frames as PNG or JPEG")
SOUND = Kind("a sound file without a picture", "give a video or an image")
PLAYLIST = Kind("a playlist, not a video", "download the video that it lists and give that file")
WEB_PAGE = Kind("a web page", "download the file that the page shows")

# (offset, bytes, what it is); the first match counts.
_MAGIC = (
    (0, b"\x89PNG", _readable("a PNG file")),
    (0, b"\xff\xd8\xff", _readable("a JPEG file")),
    (0, b"GIF8", _readable("a GIF file")),
    (8, b"WEBP", _readable("a WebP file")),
    (0, b"%PDF", Kind("a PDF document", "export the page as PNG or JPEG")),
    (0, b"%!PS", _picture("PostScript")),
    (0, b"8BPS", _picture("a Photoshop file")),
    (0, b"gimp xcf", _picture("a GIMP file")),
    (0, b"\xff\x0a", _picture("a JPEG XL image")),
    (4, b"JXL ", _picture("a JPEG XL image")),
    (4, b"jP  ", _picture("a JPEG 2000 image")),
    (0, b"\x76\x2f\x31\x01", _picture("an OpenEXR image")),
    (0, b"#?RADIANCE", _picture("a Radiance HDR image")),
    (0, b"DDS ", _picture("a DirectDraw texture")),
    (0, b"FUJIFILMCCD-RAW", RAW),
    (8, b"CR\x02", RAW),
    (0, b"IIU\0", RAW),
    (0, b"IIRO", RAW),
    (0, b"MM\0*", _readable("a TIFF file")),
    (0, b"II*\0", _readable("a TIFF file")),
    (8, b"AVI ", VIDEO),
    (0, b"\x1aE\xdf\xa3", VIDEO),
    (0, b"\0\0\x01\xba", VIDEO),
    (0, b"FLV", VIDEO),
    (8, b"WAVE", SOUND),
    (0, b"ID3", SOUND),
    (0, b"\xff\xfb", SOUND),
    (0, b"OggS", SOUND),
    (0, b"fLaC", SOUND),
    (0, b"#EXTM3U", PLAYLIST),
    (0, b"ffconcat", PLAYLIST),
    (0, b"[playlist]", PLAYLIST),
    (0, b"PK\x03\x04", Kind("a zip archive", "unpack it and give a file of it")),
    (0, b"version https://git-lfs", Kind("a Git LFS pointer, not the file", "fetch the file with git lfs pull")),
    (0, b"BM", _readable("a BMP file")),
)
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Raw files that are TIFF inside, of which a reader of TIFF sees the thumbnail alone.
_RAW_SUFFIXES = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw", ".3fr", ".iiq")


def kind(file: Path) -> Kind | None:
    """What a local file is; None where its first bytes do not tell.

    Raises:
      OSError: it cannot be read.
    """
    with open(file, "rb") as content:
        head = content.read(512)
    if not head:
        return Kind("an empty file", "save or download it again")
    if file.suffix.lower() in _RAW_SUFFIXES:
        return RAW
    if head[4:8] == b"ftyp":
        return _of_brands(head[8:12], head[8 : int.from_bytes(head[:4])])
    for offset, magic, found in _MAGIC:
        if head.startswith(magic, offset):
            return found
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in text or (text.startswith(b"<?xml") and file.suffix.lower() == ".svg"):
        return Kind("an SVG drawing", "export it as PNG")
    return WEB_PAGE if text.startswith((b"<!doctype html", b"<html")) else None


def _of_brands(major: bytes, brands: bytes) -> Kind:
    """The kind of an ISO media file by its major and its compatible brands."""
    if major == b"crx ":
        return RAW
    if b"avif" in brands or b"avis" in brands:
        return AVIF
    return HEIC if major in _HEIF else VIDEO
