"""Videos of the bundled miniature, and how far apart two are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maxdiffusion import generate_wan, request

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
QUIET = ("output_format=npy", "log_level=error", "jax_cache_dir=")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of 8-bit frames, dB."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def made(folder: Path, *words: str, page: str = "wan_tiny", quiet: Sequence[str] = QUIET) -> list[np.ndarray]:
    """The videos that the command makes of a page with these words, f h w c uint8."""
    paths = generate_wan.run(request.load([str(CONFIGS / f"{page}.yml"), *quiet, f"output_dir={folder}", *words]))
    return [np.load(path) for path in paths]
