"""Weights in 8 bits, computed from a checkpoint's as they stream: symmetric, one scale for each row.

A row of a linear layer's tensor is an output channel.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import ml_dtypes  # noqa: F401  registers float8
import numpy as np

from maxdiffusion.errors import UserError
from maxdiffusion.hardware.quantization import LARGEST
from maxdiffusion.weights.sources import TensorSource

_NAMES = {"int8": "I8", "float8_e4m3fn": "F8_E4M3"}  # by jax' names


def by_row(tensor: TensorSource, dtype: str) -> tuple[TensorSource, TensorSource]:
    """The values of a matrix in `dtype` (int8 or float8_e4m3fn) and the fp32 scale of each row.

    Those of a file that stores this dtype, with one scale for the tensor or each row, are its own. Otherwise a row's
    scale is its largest magnitude divided by the dtype's, and values are rounded to nearest even; the scales are found
    with the values and kept, so that reading them afterwards reads no file.

    Raises:
      UserError: when rows are read, a number is not finite.
    """
    scales = np.full(tensor.shape[:1], np.nan, np.float32)

    def numbers(start: int, stop: int) -> np.ndarray:
        """In fp32; fills in the rows' scales."""
        rows = tensor.rows(start, stop).astype(np.float32)
        largest = np.abs(rows).max(axis=1, initial=0.0)
        if not np.isfinite(largest).all():
            raise UserError(f"{tensor.file} stores numbers in {tensor.name!r} that are not finite; download it again.")
        found = largest / np.float32(LARGEST[dtype])
        scales[start:stop] = np.where(found > 0, found, 1)
        return rows

    def values(start: int, stop: int) -> np.ndarray:
        rows = numbers(start, stop)
        rows /= scales[start:stop, None]
        np.clip(rows, -LARGEST[dtype], LARGEST[dtype], out=rows)
        return (np.rint(rows, out=rows) if dtype == "int8" else rows).astype(dtype)

    def kept(start: int, stop: int) -> np.ndarray:
        if np.isnan(scales[start:stop]).any():  # of rows that no device of this host has
            numbers(start, stop)
        return scales[start:stop]

    if tensor.quantized is not None and tensor.quantized[0].dtype == _NAMES[dtype]:
        stored, scale = tensor.quantized
        return stored, _scales(tensor, functools.partial(_own, scale))
    computed = dataclasses.replace(tensor, dtype=_NAMES[dtype], computed=True, rows=values, quantized=None)
    return computed, _scales(tensor, kept)


def rounded(tensor: TensorSource, start: int, stop: int, dtype: str) -> np.ndarray:
    """Some rows of `by_row`'s values times their scales, fp32."""
    values, scale = by_row(tensor, dtype)
    numbers = values.rows(start, stop).astype(np.float32)
    return numbers * scale.rows(start, stop)[:, None]


def _scales(tensor: TensorSource, rows: Callable[[int, int], np.ndarray]) -> TensorSource:
    shape = tensor.shape[:1]
    return dataclasses.replace(tensor, dtype="F32", shape=shape, nbytes=0, computed=False, rows=rows, quantized=None)


def _own(scale: TensorSource | None, start: int, stop: int) -> np.ndarray:
    """The file's scales of some rows."""
    if scale is None:
        return np.ones(stop - start, np.float32)
    part = (start, stop) if math.prod(scale.shape) > 1 else (0, 1)
    factors = scale.rows(*part).astype(np.float32).reshape(-1)
    if not np.isfinite(factors).all():
        raise UserError(f"{scale.file} stores a scale in {scale.name!r} that is not finite; download it again.")
    return np.broadcast_to(factors, stop - start)
