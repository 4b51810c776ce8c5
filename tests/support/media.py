"""What `maxdiffusion.media.write` stores beside the frames."""

from __future__ import annotations

import json
from pathlib import Path

import av
from PIL import ExifTags, Image, UnidentifiedImageError

# Formats of several frames, and their suffixes; png is a folder.
CLIPS = {"mp4": ".mp4", "gif": ".gif", "webp": ".webp", "png": "", "npy": ".npy"}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an mp4, gif, webp or folder of frames; empty where there is none."""
    if path.suffix == ".npy":
        return {}
    try:
        with Image.open(path / "0000.png" if path.is_dir() else path) as image:
            exif = image.getexif().get(ExifTags.Base.ImageDescription)
            comment = exif or image.info.get("comment") or image.info.get("Comment")
            comment = comment.decode() if isinstance(comment, bytes) else comment
    except UnidentifiedImageError:
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            comment = container.metadata.get("comment")
    return json.loads(comment) if comment else {}
