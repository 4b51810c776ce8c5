"""Sound files."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np


def tone(path: Path, seconds: float, rate: int = 16000, loud: float = 0.5) -> Path:
    """A .wav of one channel, 16 bits: a tone that rises from 200 to 2000 Hz and swells three times a second."""
    at = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * (200 * at + 900 * at**2 / max(seconds, 1e-9))
    values = loud * np.sin(phase) * np.sin(3 * np.pi * at) ** 2
    return write(path, values, rate)


def write(path: Path, values: np.ndarray, rate: int) -> Path:
    """Samples in -1..1, of one channel or one row for each, as 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if values.ndim == 1 else len(values))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((values.T * 32767).astype("<i2").tobytes())
    return path
