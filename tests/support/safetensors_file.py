"""Safetensors files with fp8, which `safetensors.numpy` cannot write, and the official repositories' names."""

from __future__ import annotations

import functools
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int8): "I8",
    np.dtype(np.int32): "I32",
}


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, array in tensors.items():
        part = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


END = r"(?P<end>\.[a-z]+)?"


@functools.cache
def _backwards(rows: tuple[tuple[str, str | tuple[str, ...]], ...]) -> list[tuple[re.Pattern, str, int]]:
    return [
        (re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[0-9]+)", re.escape(part)) + END), theirs, len(parts))
        for theirs, ours in rows
        for parts in [(ours,) if isinstance(ours, str) else ours]
        for part in parts
    ]


def original_name(name: str, table: Mapping[str, str | tuple[str, ...]]) -> tuple[str, int]:
    """The table read backwards, by code of its own: the original name and how many tensors it holds."""
    hits = {}
    for pattern, theirs, parts in _backwards(tuple(table.items())):
        if hit := pattern.fullmatch(name):
            numbers = hit.groupdict()
            hits[theirs.format(**numbers) + (numbers["end"] or "")] = parts
    assert len(hits) <= 1, f"{name} has several original names: {hits}"
    return next(iter(hits.items()), (name, 1))
