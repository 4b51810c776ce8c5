"""GGUF files written by the format's own library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType


def blocks(kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    """Random blocks of any quantisation whose numbers are finite, as bytes; the last axis is that of a row's bytes."""
    rng = np.random.default_rng(kind.value)
    numbers, nbytes = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // numbers
    found = np.zeros((0, nbytes), np.uint8)
    while len(found) < count:
        candidates = rng.integers(0, 256, (4 * count, nbytes), np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(candidates, kind)
        found = np.concatenate([found, candidates[np.isfinite(values).all(axis=1)]])
    return found[:count].reshape(*shape[:-1], -1)


def write(
    path: Path,
    tensors: Mapping[str, tuple[np.ndarray, Kind]],
    architecture: str = "wan",
    add: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> None:
    """Writes tensors, each as an array in fp32 or fp16, or as the bytes of its quantisation; `add` adds metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    add(writer)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=None if kind in (Kind.F32, Kind.F16) else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
