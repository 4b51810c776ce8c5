"""Pictures on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(folder: Path, name: str, size: tuple[int, int], seed: int = 0) -> str:
    """Writes a file of smooth colours, an edge and noise, and returns its path; `size` is width and height."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(small, int) + rng.integers(-9, 10, (*size[::-1], 3))
    pixels[size[1] // 3 :, size[0] // 2 :] //= 2
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
    return str(folder / name)
