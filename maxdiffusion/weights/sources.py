"""The tensors of a checkpoint, read by rows: stored ones, and those computed from others.

A row is an index of the first axis; a scalar has one row. Sources compose, and reading some rows needs the memory of
those alone. Names and shapes are needed before any number is (`--help`, `inspect`), so the first read imports numpy,
which takes 0.06 s.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.paths import AnyPath

if TYPE_CHECKING:
    from numpy import ndarray as Rows
else:
    Rows = object

BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
BYTES |= {"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}
# The dtypes of weights, by their names in numpy and ml_dtypes.
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FLOATS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_INTEGERS = {f"{kind}{bits}": f"{name}int{bits}" for kind, name in (("I", ""), ("U", "u")) for bits in (8, 16, 32, 64)}
_NUMPY = {**FLOATS, **_INTEGERS, "BOOL": "bool"}

STRIP = 2**22  # bytes per read from a file on this machine
RANGE = 2**23  # bytes per request to an object store, where each costs a round trip


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """A tensor whose rows can be read in any order, by several threads at once.

    Attributes:
      name: its name in the file.
      dtype: of what `rows` returns, a key of BYTES.
      shape: of the whole tensor.
      file: the file that holds it.
      start: its first byte in the file.
      nbytes: bytes read from disk, without scales.
      stored_as: its dtype in the file, with " scaled" where it has scales; for GGUF the quantisation, such as "Q4_K".
      computed: whether reading takes arithmetic enough for a thread.
      quantized: values and scale (None: 1) of fp8 and int8, of which `rows` returns the product; None for others.
      rows: (start, stop) -> an array of shape (stop - start, *shape[1:]); for a scalar the shape is (1,). Raises
        UserError where the file cannot be read or is shorter than its header says.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: AnyPath
    start: int
    nbytes: int
    stored_as: str
    rows: Callable[[int, int], Rows] = dataclasses.field(compare=False, repr=False)
    computed: bool = False
    quantized: tuple[TensorSource, TensorSource | None] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )


def strips(source: TensorSource, start: int, stop: int) -> Iterator[tuple[int, Rows]]:
    """(index of the first row, rows) of rows start to stop: some MiB at a time, several requests at once if remote."""
    row = math.prod(source.shape[1:]) * BYTES[source.dtype]
    size = STRIP if isinstance(source.file, Path) else RANGE
    # Of a sum, its terms are held beside it, by several threads: 87 MB at rank 64; with strips of 4 MiB it was 212 MB.
    step = max(1, (size // 4 if source.computed else size) // max(row, 1))
    firsts = range(start, stop, step)
    rows = paths.each(source.file, lambda first: source.rows(first, min(first + step, stop)), firsts)
    for first in firsts:
        yield first, next(rows)


def stored(name: str, dtype: str, shape: tuple[int, ...], file: AnyPath, start: int) -> TensorSource:
    """A tensor in a file, row-major and little-endian, from byte `start` on."""
    row = math.prod(shape[1:]) * BYTES[dtype]

    def rows(first: int, last: int) -> Rows:
        import ml_dtypes  # noqa: F401  registers bfloat16 and float8
        import numpy as np

        data = _read(name, file, start + first * row, start + last * row)
        return np.frombuffer(data, _NUMPY[dtype]).reshape(last - first, *shape[1:])

    return TensorSource(name, dtype, shape, file, start, math.prod(shape) * BYTES[dtype], dtype, rows)


def quantised(
    name: str, kind: str, block: tuple[int, int], shape: tuple[int, ...], file: AnyPath, start: int
) -> TensorSource:
    """A tensor of GGUF's blocks in fp32.

    Args:
      name: its name in the file.
      kind: the quantisation, a name of gguf.GGMLQuantizationType.
      block: numbers and bytes of a block; the blocks follow each other in row-major order, and a row of the first axis
        may begin within one.
      shape: of the tensor; a whole number of blocks.
      file: the file that holds it.
      start: its first byte in the file.
    """
    numbers, nbytes = block
    row = math.prod(shape[1:])

    def rows(first: int, last: int) -> Rows:
        import gguf
        import numpy as np

        low, high = first * row // numbers, -(-last * row // numbers)  # blocks
        data = np.frombuffer(_read(name, file, start + low * nbytes, start + high * nbytes), np.uint8)
        with np.errstate(invalid="ignore"):
            values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(-1)
        if not np.isfinite(values).all():
            raise UserError(f"{file} stores numbers in {name!r} that are not finite; download it again.")
        return values[first * row - low * numbers : last * row - low * numbers].reshape(last - first, *shape[1:])

    return TensorSource(name, "F32", shape, file, start, math.prod(shape) // numbers * nbytes, kind, rows)


def _read(name: str, file: AnyPath, start: int, stop: int) -> bytes:
    """The bytes `start` to `stop` of the file of the tensor `name`."""
    try:
        data = paths.read(file, start, stop)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); check the disk and load again.") from None
    if len(data) != stop - start:
        raise UserError(f"{file} ends within {name!r}; it changed while loading: copy it again.")
    return data


def scaled(tensor: TensorSource, scale: TensorSource | None = None) -> TensorSource:
    """A tensor in fp32, times its scale: one number, or one for each row, (rows,) or (rows, 1); None is 1.

    Its `rows` raise a UserError where a scale is not finite.
    """

    def rows(start: int, stop: int) -> Rows:
        import numpy as np

        numbers = tensor.rows(start, stop)
        if numbers.dtype.itemsize == 1:
            numbers = _values(tensor.dtype)[numbers.view("uint8")]
        else:
            numbers = numbers.astype("float32")
        if scale:
            part = (start, stop) if math.prod(scale.shape) > 1 else (0, 1)
            factors = scale.rows(*part).astype("float32")
            if not np.isfinite(factors).all():
                raise UserError(f"{scale.file} stores a scale in {scale.name!r} that is not finite; download it again.")
            numbers *= factors.reshape(-1, *(1,) * (numbers.ndim - 1))
        return numbers

    stored_as = tensor.stored_as + (" scaled" if scale else "")
    parts = (tensor, scale) if BYTES[tensor.dtype] == 1 else None
    return dataclasses.replace(tensor, dtype="F32", stored_as=stored_as, rows=rows, quantized=parts)


@functools.cache
def _values(dtype: str) -> Rows:
    """All 256 values of an fp8 dtype or int8 in fp32: looked up three times as fast as ml_dtypes casts fp8."""
    import numpy as np

    return np.arange(256, dtype="uint8").view(_NUMPY[dtype]).astype("float32")


def row_slice(tensor: TensorSource, first: int, count: int) -> TensorSource:
    """`count` rows of a fused tensor, from row `first` on."""
    row = tensor.nbytes // max(tensor.shape[0], 1)
    parts = None
    if tensor.quantized:
        values, scale = tensor.quantized
        by_row = scale is not None and math.prod(scale.shape) > 1
        parts = row_slice(values, first, count), row_slice(scale, first, count) if scale and by_row else scale
    return dataclasses.replace(
        tensor,
        shape=(count, *tensor.shape[1:]),
        start=tensor.start + first * row,
        nbytes=count * row,
        rows=lambda start, stop: tensor.rows(first + start, first + stop),
        quantized=parts,
    )


def plus(tensor: TensorSource, delta: TensorSource) -> TensorSource:
    """Tensor + delta, of one shape, in fp32; whoever reads it casts once.

    Raises:
      ValueError: the shapes differ.
    """
    if tensor.shape != delta.shape:
        raise ValueError(f"{tensor.name} has shape {tensor.shape} and its delta {delta.name} {delta.shape}")

    def rows(start: int, stop: int) -> Rows:
        total = tensor.rows(start, stop).astype("float32")
        total += delta.rows(start, stop).astype("float32", copy=False)
        return total

    nbytes = tensor.nbytes + delta.nbytes
    return dataclasses.replace(tensor, dtype="F32", nbytes=nbytes, computed=True, rows=rows, quantized=None)
