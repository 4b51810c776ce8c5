"""Arithmetic of updates in fp32, by rows: LoRA, LoHa, LoKr, whole differences, and DoRA's magnitudes.

Conventions are those of PEFT and of LyCORIS, with which the tests compare.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from maxdiffusion.weights.sources import TensorSource, strips

if TYPE_CHECKING:
    from numpy import ndarray as Rows
else:
    Rows = object

# Factors that are kept while their modules are read strip by strip, several modules at once: at rank 64 some 10 MB.
_KEPT = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix whose rows can be computed in any order; axes after the first are flattened.

    Attributes:
      shape: (rows, columns).
      rank: of its factors; None for a stored one.
      nbytes: of its factors in their file.
      rows: (start, stop) -> fp32 of shape (stop - start, columns).
    """

    shape: tuple[int, int]
    rank: int | None
    nbytes: int
    rows: Callable[[int, int], Rows]


class Mismatch(ValueError):
    """Factors that cannot be multiplied; the text gives their shapes."""


def matrix(parts: Mapping[str, TensorSource]) -> Matrix | None:
    """The update without its scale; None for parts that hold none (of a bias alone).

    Raises:
      KeyError: a factor is missing; its argument is the name of that part.
      Mismatch: two factors cannot be multiplied.
    """
    if any(part.startswith("hada_") for part in parts):
        return _hadamard(*(_factors(parts, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)))
    if any(part.startswith("lokr_") for part in parts):
        return _kronecker(_kronecker_factor(parts, 1), _kronecker_factor(parts, 2))
    if {"up", "down", "mid"} & parts.keys():
        return _factors(parts, "up", "down", "mid")
    return stored(parts["diff"]) if "diff" in parts else None


def stored(tensor: TensorSource) -> Matrix:
    """A tensor as it is."""
    shape = (tensor.shape[0] if tensor.shape else 1, math.prod(tensor.shape[1:]))

    def rows(start: int, stop: int) -> Rows:
        return tensor.rows(start, stop).astype("float32").reshape(-1, shape[1])

    return Matrix(shape, None, tensor.nbytes, rows)


def row_slice(update: Matrix, first: int, count: int) -> Matrix:
    """`count` of its rows, from row `first` on."""
    nbytes = update.nbytes * count // update.shape[0]
    shift = lambda start, stop: update.rows(first + start, first + stop)  # noqa: E731
    return Matrix((count, update.shape[1]), update.rank, nbytes, shift)


@functools.lru_cache(_KEPT)
def _whole(factor: Matrix) -> Rows:
    return factor.rows(0, factor.shape[0])


def _factors(parts: Mapping[str, TensorSource], up: str, down: str, middle: str) -> Matrix:
    """Up @ down; with a Tucker core between them, of shape (rank of up, rank of down, *kernel)."""
    a, b = stored(parts[up]), stored(parts[down])
    if middle not in parts:
        return _product(a, b)
    core = parts[middle]
    if middle != "mid":  # LyCORIS stores the outer factor of LoHa and LoKr transposed
        first = a
        a = Matrix(first.shape[::-1], None, first.nbytes, lambda start, stop: _whole(first)[:, start:stop].T)
    if len(core.shape) < 2 or core.shape[:2] != (a.shape[1], b.shape[0]):
        raise Mismatch(f"{list(parts[up].shape)}, {list(core.shape)} and {list(parts[down].shape)}")
    kernel = math.prod(core.shape[2:])

    def contracted(start: int, stop: int) -> Rows:
        import numpy as np

        taps = core.rows(start, stop).astype("float32").reshape(stop - start, core.shape[1], kernel)
        return np.einsum("pqk,qi->pik", taps, _whole(b)).reshape(stop - start, -1)

    shape = (core.shape[0], b.shape[1] * kernel)
    return _product(a, Matrix(shape, None, core.nbytes + b.nbytes, contracted))


def _product(a: Matrix, b: Matrix) -> Matrix:
    if a.shape[1] != b.shape[0]:
        raise Mismatch(f"{list(a.shape)} and {list(b.shape)}")
    shape, nbytes = (a.shape[0], b.shape[1]), a.nbytes + b.nbytes
    return Matrix(shape, b.shape[0], nbytes, lambda start, stop: a.rows(start, stop) @ _whole(b))


def _hadamard(a: Matrix, b: Matrix) -> Matrix:
    if a.shape != b.shape:
        raise Mismatch(f"{list(a.shape)} and {list(b.shape)}")
    return Matrix(a.shape, b.rank, a.nbytes + b.nbytes, lambda *rows: a.rows(*rows) * b.rows(*rows))


def _kronecker_factor(parts: Mapping[str, TensorSource], i: int) -> Matrix:
    if f"lokr_w{i}" in parts:
        return stored(parts[f"lokr_w{i}"])
    return _factors(parts, f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}")


def _kronecker(a: Matrix, b: Matrix) -> Matrix:
    """The Kronecker product; a kernel's axes are the last ones of `b` and stay there."""

    def rows(start: int, stop: int) -> Rows:
        import numpy as np

        i, j = np.divmod(np.arange(start, stop), b.shape[0])
        return (_whole(a)[i][:, :, None] * _whole(b)[j][:, None, :]).reshape(stop - start, -1)

    shape = (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])
    return Matrix(shape, b.rank if a.rank is None else a.rank, a.nbytes + b.nbytes, rows)


def scaled(update: Matrix, scale: float, like: TensorSource) -> TensorSource:
    """The update times `scale`, as a tensor of the shape of `like`.

    Raises:
      Mismatch: it has another shape.
    """
    if update.shape != stored(like).shape:
        raise Mismatch(f"{update.shape[0]}x{update.shape[1]} instead of {'x'.join(map(str, stored(like).shape))}")

    def rows(start: int, stop: int) -> Rows:
        numbers = update.rows(start, stop)
        numbers *= scale
        return numbers.reshape(stop - start, *like.shape[1:])

    return dataclasses.replace(like, dtype="F32", nbytes=update.nbytes, rows=rows, quantized=None)


def decomposed(weight: TensorSource, delta: TensorSource, magnitude: TensorSource, strength: float) -> TensorSource:
    """DoRA: W + strength (m V / |V| - W) with V = W + delta.

    Norms are those of V's rows where `magnitude` has one number for each (PEFT, and LyCORIS by default), else those of
    its input channels, (1, channels, ...), for which all rows are read once more.

    Raises:
      Mismatch: `magnitude` has another number of elements.
    """
    count = math.prod(magnitude.shape)
    out, channels = (*weight.shape, 1)[:2]
    by_row = count == out and (magnitude.shape[:1] == (out,) or out != channels)
    if not by_row and count != channels:
        raise Mismatch(f"{list(magnitude.shape)} for a weight of {list(weight.shape)}")
    magnitudes = stored(magnitude)
    others = (1,) * (len(weight.shape) - 1)

    def changed(first: int, base: Rows) -> Rows:
        return base + delta.rows(first, first + len(base))

    @functools.lru_cache(1)
    def of_channels() -> Rows:
        import numpy as np

        axes = (0, *range(2, len(weight.shape)))
        parts = (changed(first, base.astype("float32", copy=False)) for first, base in strips(weight, 0, out))
        total = sum(np.square(part, dtype="float64").sum(axes) for part in parts)
        return _quotient(_whole(magnitudes).reshape(-1), np.sqrt(total)).reshape(-1, *others[1:])

    def rows(start: int, stop: int) -> Rows:
        import numpy as np

        base = weight.rows(start, stop).astype("float32", copy=False)
        total = changed(start, base)
        if by_row:
            norms = np.sqrt(np.square(total).reshape(stop - start, -1).sum(1))
            numbers = _whole(magnitudes).reshape(-1)[start:stop]
            scale = _quotient(numbers, norms).reshape(-1, *others)
        else:
            scale = of_channels()
        return base + strength * (scale * total - base)

    nbytes = weight.nbytes + delta.nbytes + magnitude.nbytes
    return dataclasses.replace(weight, dtype="F32", nbytes=nbytes, computed=True, rows=rows, quantized=None)


def _quotient(numbers: Rows, norms: Rows) -> Rows:
    import numpy as np

    return (numbers / np.maximum(norms, np.finfo("float32").tiny)).astype("float32")
