"""The order of a slice's devices in the mesh, from the coordinates of the chips."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Shape = tuple[int, ...]

# Distance of the two cores of a chip, in links between chips: of TPU7x, (1 / 600) / (1 / 100) s per GB.
_CORE = 1 / 6


def arrange(devices: Sequence[Any], shape: Shape) -> np.ndarray:
    """The devices of one slice as an array of `shape` = (data, fsdp, ring, ulysses, tensor).

    TPUs have coordinates in a grid of chips. Each axis of the mesh is a box in that grid, made of the boxes of the axes
    after it. Of all ways to cut the grid, the best has the most compact tensor groups, then Ulysses groups (their
    all-to-all does not overlap with compute), then the least traffic per link when rings rotate, then closed rings.
    Other devices, and TPUs that do not fill a grid, keep their order.
    """
    flat = np.empty(len(devices), object)
    flat[:] = devices
    if devices[0].platform != "tpu":
        return flat.reshape(shape)
    places = np.array([(device.core_on_chip, *device.coords) for device in devices])
    places -= places.min(axis=0)
    grid = tuple(int(size) for size in places.max(axis=0) + 1)
    if math.prod(grid) != len(devices):
        return flat.reshape(shape)
    by_place = np.empty(grid, object)
    by_place[tuple(places.T)] = flat
    index = np.zeros((1, len(grid)), int)
    for box, stride in min(_cuts(grid, (1,) * len(grid), shape[::-1]), key=_cost):
        index = (np.array(walk(box))[:, None] * stride + index).reshape(-1, len(grid))
    return by_place[tuple(index.T)].reshape(shape)


def walk(box: Shape) -> list[Shape]:
    """A path through all points of a grid from neighbour to neighbour, closed if the grid has a closed one."""
    even = next((axis for axis, size in enumerate(box) if size % 2 == 0), None)
    if even is None or max(box) == math.prod(box):
        return _snake(box)
    home, *line = _snake((*box[:even], 1, *box[even + 1 :]))
    # There and back along the rest of the grid, row by row, then back along its first point.
    rows = [(row, point) for row in range(box[even]) for point in (line if row % 2 == 0 else line[::-1])]
    path = [(0, home), *rows, *((row, home) for row in range(box[even] - 1, 0, -1))]
    return [(*point[:even], row, *point[even + 1 :]) for row, point in path]


def _snake(box: Shape) -> list[Shape]:
    """A path through all points of a grid from neighbour to neighbour."""
    points: list[Shape] = [()]
    for size in box:
        points = [(*p, i) for n, p in enumerate(points) for i in (range(size) if n % 2 == 0 else reversed(range(size)))]
    return points


def _cuts(left: Shape, stride: Shape, sizes: Shape) -> Iterator[list[tuple[Shape, Shape]]]:
    """Yields every way to build a grid of boxes of the given sizes, innermost first, as (box, its stride) of each."""
    if not sizes:
        yield []
        return
    for box in itertools.product(*([d for d in range(1, n + 1) if n % d == 0] for n in left)):
        if math.prod(box) == sizes[0]:
            rest = tuple(n // d for n, d in zip(left, box, strict=True))
            wider = tuple(s * d for s, d in zip(stride, box, strict=True))
            for outer in _cuts(rest, wider, sizes[1:]):
                yield [(box, stride), *outer]


def _cost(cut: list[tuple[Shape, Shape]]) -> tuple[Any, ...]:
    tensor, ulysses, ring, fsdp, data = cut
    return (_spread(*tensor), _spread(*ulysses), _load(*ring), not _closed(ring[0]), _spread(*fsdp), _spread(*data))


def _spread(box: Shape, stride: Shape) -> float:
    """Sum of the distances between all points of a box, in links between chips."""
    points = np.array(list(np.ndindex(box))) * stride
    per_axis = np.abs(points[:, None] - points[None]).sum(axis=(0, 1))
    return float(per_axis @ [_CORE, *[1] * (len(box) - 1)])


def _load(box: Shape, stride: Shape) -> int:
    """Blocks per link when every device sends one to the next box: the longest stride of a step.

    The transfer from the last box of an open line to the first adds none: it takes the links of the other direction.
    """
    return max((s for size, s in zip(box, stride, strict=True) if size > 1), default=0)


def _closed(box: Shape) -> bool:
    points = walk(box)
    return sum(abs(a - b) for a, b in zip(points[0], points[-1], strict=True)) <= 1
