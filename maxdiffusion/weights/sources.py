"""The tensors of a checkpoint, read by rows: stored ones, and those computed from others.

A row is an index of the first axis; a scalar has one row. Sources compose, and reading some rows needs the memory of
those alone. Names and shapes are asked for before any number is (`--help`, `inspect`), so the first read imports numpy,
which takes 0.06 s.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.paths import AnyPath

if TYPE_CHECKING:
    from numpy import ndarray as Rows
else:
    Rows = object

BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
BYTES |= {"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}
# Those of weights, in numpy's and ml_dtypes' words.
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FLOATS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

STRIP = 2**22  # bytes read at once of a file on this machine
RANGE = 2**23  # the same of an object store, where each request costs a round trip


@runtime_checkable
class TensorSource(Protocol):
    """A tensor whose rows can be read in any order, by several threads at once."""

    @property
    def name(self) -> str:
        """In the file, for messages."""

    @property
    def file(self) -> AnyPath: ...

    @property
    def dtype(self) -> str:
        """Of what `rows` returns: a key of BYTES."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int:
        """Bytes read from disk, without scales."""

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start to stop, of shape (stop - start, *shape[1:]); a scalar is one number of shape (1,).

        Raises:
          UserError: the file cannot be read, or is shorter than its header says.
        """


def strips(source: TensorSource, start: int, stop: int) -> Iterator[tuple[int, Rows]]:
    """(index of the first row, rows) of rows start to stop: some MiB at a time, several requests at once if remote."""
    row = math.prod(source.shape[1:]) * BYTES[source.dtype]
    step = max(1, (STRIP if isinstance(source.file, Path) else RANGE) // max(row, 1))
    firsts = range(start, stop, step)
    rows = paths.each(source.file, lambda first: source.rows(first, min(first + step, stop)), firsts)
    for first in firsts:
        yield first, next(rows)


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in a file: `file[start:start + nbytes]`, row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: AnyPath
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]

    def rows(self, start: int, stop: int) -> Rows:
        import ml_dtypes  # noqa: F401  registers bfloat16 and float8
        import numpy as np

        row = math.prod(self.shape[1:]) * BYTES[self.dtype]
        try:
            data = paths.read(self.file, self.start + start * row, self.start + stop * row)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error.strerror}); check the disk and load again.") from None
        if len(data) != (stop - start) * row:
            raise UserError(f"{self.file} ends within {self.name!r}; it changed while loading: copy it again.")
        return np.frombuffer(data, FLOATS[self.dtype]).reshape(stop - start, *self.shape[1:])


@dataclasses.dataclass(frozen=True)
class Derived:
    """A tensor computed from `parent`, row by row; a subclass overrides what it changes."""

    parent: TensorSource

    @property
    def name(self) -> str:
        return self.parent.name

    @property
    def file(self) -> AnyPath:
        return self.parent.file

    @property
    def dtype(self) -> str:
        return self.parent.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parent.shape

    @property
    def nbytes(self) -> int:
        return self.parent.nbytes


@dataclasses.dataclass(frozen=True)
class Scaled(Derived):
    """An fp8 tensor in fp32, times its scale: one number, or one for each row, (rows,) or (rows, 1); None is 1."""

    scale: TensorSource | None = None

    dtype = "F32"

    def rows(self, start: int, stop: int) -> Rows:
        numbers = _fp8_values(self.parent.dtype)[self.parent.rows(start, stop).view("uint8")]
        if self.scale:
            part = (start, stop) if math.prod(self.scale.shape) > 1 else (0, 1)
            numbers *= self.scale.rows(*part).astype("float32").reshape(-1, *(1,) * (numbers.ndim - 1))
        return numbers


@functools.cache
def _fp8_values(dtype: str) -> Rows:
    """All 256 values of an fp8 dtype in fp32: looked up three times as fast as ml_dtypes casts."""
    import numpy as np

    return np.arange(256, dtype="uint8").view(FLOATS[dtype]).astype("float32")


@dataclasses.dataclass(frozen=True)
class RowSlice(Derived):
    """`count` rows of a fused tensor, from row `first` on."""

    first: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.parent.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.parent.nbytes // max(self.parent.shape[0], 1) * self.count

    def rows(self, start: int, stop: int) -> Rows:
        return self.parent.rows(self.first + start, self.first + stop)


@dataclasses.dataclass(frozen=True)
class Plus(Derived):
    """`parent` + `delta` in fp32, two tensors of one shape.

    Raises:
      ValueError: the shapes differ.
    """

    delta: TensorSource

    dtype = "F32"

    def __post_init__(self) -> None:
        if self.parent.shape != self.delta.shape:
            raise ValueError(f"{self.name} has the shape {self.shape} and its delta {self.delta.shape}")

    @property
    def nbytes(self) -> int:
        return self.parent.nbytes + self.delta.nbytes

    def rows(self, start: int, stop: int) -> Rows:
        return self.parent.rows(start, stop).astype("float32") + self.delta.rows(start, stop)
