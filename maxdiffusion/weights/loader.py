"""Streams tensors from safetensors to the shards of an nnx module.

Each tensor is read by small strips that are written, permuted and cast, straight into the buffers of its shards. On the
CPU these buffers become the parameter itself (jax aliases aligned host memory); on other devices a stacked parameter is
filled one slot at a time where it will live. So the host never holds more than one tensor beside what it keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from maxdiffusion.errors import UserError
from maxdiffusion.parallel import Placement
from maxdiffusion.runtime import paths
from maxdiffusion.weights.checkpoint import TensorInfo
from maxdiffusion.weights.mapping import Piece, Pieces

log = logging.getLogger(__name__)

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
FP8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
# All that a byte can be, in fp32: looked up three times as fast as ml_dtypes casts.
_FP8_VALUES = {name: np.arange(256, dtype=np.uint8).view(kind).astype(np.float32) for name, kind in FP8.items()}

# Device kind -> layout of stacked bf16 matrices. Arrays of a TPU7x come in tiles of 8 rows, its programs compute with
# tiles of 16: each step of the 14B model would begin with a copy of all weights, 22 GiB.
MATRICES = {"TPU7x": Layout((0, 1, 2), ((16, 128), (2, 1)))}

_STRIP = 2**22  # bytes read at once, which is what loading needs beside the parameters
_RANGE = 2**23  # the same for files elsewhere, as each request costs a round trip
_ALIGNMENT = 64  # what XLA's CPU client asks of a host buffer that it aliases

Box = tuple[tuple[int, int], ...]  # (start, stop) per axis of an array: the part that one device holds
Module = TypeVar("Module", bound=nnx.Module)


def materialize(
    described: Module,
    pieces: Pieces,
    placement: Placement | None = None,
    on_tensor: Callable[[int], object] = lambda nbytes: None,
) -> Module:
    """A copy of `described` whose parameters hold the checkpoint's weights, each on its devices.

    Args:
      described: the net; each parameter gives its shape and dtype and, as metadata, the logical axes that decide its
        sharding. It stays as it is, so that it can be loaded again.
      pieces: what `mapping.match` found for it.
      placement: None puts everything on jax's default device.
      on_tensor: called with the number of bytes of each tensor once it is read.

    Raises:
      UserError: a file cannot be read or ends early (it changed after its header was checked), or a tensor that is
        stored twice differs from its copy.
    """

    def fill(name: str, leaf: nnx.Variable[Any]) -> jax.Array:
        sharding = _sharding(name, leaf, placement)
        array = _parameter(leaf.shape, np.dtype(leaf.dtype), sharding, pieces[name], on_tensor)
        return jax.device_put(array, _format(leaf, sharding))

    return _map(fill, described)


def placed(described: Module, placement: Placement | None) -> Module:
    """A copy of `described` whose shapes carry the shardings that `materialize` would give: enough to compile for."""

    def place(name: str, leaf: nnx.Variable[Any]) -> jax.ShapeDtypeStruct:
        sharding = _sharding(name, leaf, placement)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_format(leaf, sharding))

    return _map(place, described)


def _map(make: Callable[[str, nnx.Variable[Any]], object], described: Module) -> Module:
    """A copy of `described` with a new value for each parameter, made from its dotted name and description."""
    graph, state = nnx.split(described)
    leaves = [(path, leaf.replace(make(".".join(map(str, path)), leaf))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def _sharding(name: str, leaf: nnx.Variable[Any], placement: Placement | None) -> Sharding:
    if placement is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    axes = leaf.get_metadata().get("out_sharding") or (None,) * len(leaf.shape)
    if len(axes) != len(leaf.shape):
        raise ValueError(f"{name} has the shape {leaf.shape} and the logical axes {axes}: they must agree in number")
    fitting = [placement.dividing(axis, size) for axis, size in zip(axes, leaf.shape, strict=True)]
    if whole := [axis for axis, fits in zip(axes, fitting, strict=True) if axis and not fits]:
        log.info("%s %s is not split over %s, which does not divide it", name, tuple(leaf.shape), ", ".join(whole))
    return placement.sharding(*fitting)


def _format(leaf: nnx.Variable[Any], sharding: Sharding) -> Sharding | Format:
    """The sharding, with the layout in which the devices compute with stacked matrices in bf16 where it is another.

    Not of arrays that are split: there XLA puts its own in its place, which jax refuses.
    """
    devices: Any = sharding.device_set
    (kind,) = {device.device_kind for device in devices}
    if kind in MATRICES and leaf.dtype == jnp.bfloat16 and len(leaf.shape) == 3 and sharding.is_fully_replicated:
        return Format(MATRICES[kind], sharding)
    return sharding


def _parameter(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    pieces: Sequence[Piece],
    on_tensor: Callable[[int], object],
) -> jax.Array:
    devices: set[Any] = sharding.device_set
    if pieces[0].layer is None or all(device.platform == "cpu" for device in devices):
        return _from_host(shape, dtype, sharding, pieces, on_tensor)
    return _slot_by_slot(shape, dtype, sharding, pieces, on_tensor)


def _slot_by_slot(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    pieces: Sequence[Piece],
    on_tensor: Callable[[int], object],
) -> jax.Array:
    """A stacked parameter whose slots are copied, one after another, into the array on the devices."""
    stack = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)(shape, dtype)
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    def read(piece: Piece) -> jax.Array:
        return _from_host(shape[1:], dtype, sharding, [dataclasses.replace(piece, layer=None)], on_tensor)

    for layer, slot in enumerate(_mapping(pieces)(read, pieces)):
        stack = _set_slot(stack, slot, layer)
        stack.block_until_ready()  # else the host would run ahead of the copies and hold many slots
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set_slot(stack: jax.Array, slot: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, slot, layer, axis=0)


def _from_host(
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
    pieces: Sequence[Piece],
    on_tensor: Callable[[int], object],
) -> jax.Array:
    """An array of `pieces` (one tensor, or all slots of a stack) from one host buffer for each distinct shard."""
    boxes: dict[Any, Box] = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    buffers = {box: _aligned(tuple(stop - start for start, stop in box), dtype) for box in set(boxes.values())}

    def read(piece: Piece) -> int:
        if piece.layer is None:
            views = list(buffers.items())
        else:
            views = [(box[1:], buffer[piece.layer - box[0][0]]) for box, buffer in buffers.items()]
        _read(piece, views)
        return piece.tensor.nbytes

    for nbytes in _mapping(pieces)(read, pieces):
        on_tensor(nbytes)
    arrays = [jax.device_put(buffers[box], device) for device, box in boxes.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, jax.block_until_ready(arrays))


def _mapping(pieces: Sequence[Piece]) -> Any:
    """How a function is applied to pieces: in turn, or several at once where each waits for a round trip."""
    return map if isinstance(pieces[0].tensor.file, Path) else paths.ahead


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that jax aliases on the CPU; it must not be written to once it is a jax.Array."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _read(piece: Piece, views: Sequence[tuple[Box, np.ndarray]]) -> None:
    """Writes each box of the tensor, permuted and cast, into its view; only the rows that the boxes touch are read."""
    tensor, order = piece.tensor, piece.rule.transform.value or tuple(range(len(piece.tensor.shape)))
    for copy in piece.copies:
        _check_copy(tensor, copy)
    if piece.rule.reshape or not tensor.shape:
        whole = next(_strips(tensor, nbytes=tensor.nbytes))[1].reshape(tensor.shape).transpose(order)
        for box, view in views:
            view[...] = whole.reshape(piece.shape)[tuple(slice(*part) for part in box)]
        return
    torch_axes = [order.index(axis) for axis in range(len(order))]  # the axis of ours that each torch axis became
    parts = [([box[axis] for axis in torch_axes], view.transpose(torch_axes)) for box, view in views]
    rows = min(box[0][0] for box, _ in parts), max(box[0][1] for box, _ in parts)
    for first, stored in _strips(tensor, rows):
        strip = stored.astype(views[0][1].dtype, copy=False)  # twice as fast as casting while transposing
        for ((start, stop), *rest), view in parts:
            low, high = max(first, start), min(first + len(strip), stop)
            if low < high:
                view[low - start : high - start] = strip[(slice(low - first, high - first), *(slice(*r) for r in rest))]


def _strips(
    tensor: TensorInfo, rows: tuple[int, int] | None = None, nbytes: int = _STRIP
) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first row, rows) of the tensor, about `nbytes` at a time, as stored in one reused buffer.

    fp8 becomes fp32, each number times its scale, as it was quantised.
    """
    count, *rest = tensor.shape or (1,)
    start, stop = rows or (0, count)
    row = tensor.nbytes // max(count, 1)
    nbytes = nbytes if isinstance(tensor.file, Path) else max(nbytes, _RANGE)
    step = max(1, nbytes // max(row, 1))
    firsts, scale = range(start, stop, step), _scale(tensor)
    ranges = [(tensor.start + first * row, tensor.start + min(first + step, stop) * row) for first in firsts]
    try:
        for first, part in zip(firsts, _parts(tensor, ranges), strict=True):
            if tensor.dtype in FP8:
                numbers = _FP8_VALUES[tensor.dtype][part.reshape(-1, *rest)]
                numbers *= scale[first : first + len(numbers)] if len(scale) > 1 else scale
                yield first, numbers
            else:
                yield first, part.view(DTYPES[tensor.dtype]).reshape(-1, *rest)
    except OSError as error:
        raise UserError(f"{tensor.file} cannot be read ({error.strerror}); check the disk and load again.") from None


def _parts(tensor: TensorInfo, ranges: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """The bytes of each range: of a file here in one reused buffer, of one elsewhere by several requests at once."""
    if isinstance(tensor.file, Path):
        buffer = np.empty(max((stop - start for start, stop in ranges), default=0), np.uint8)
        with tensor.file.open("rb", buffering=0) as file:
            for start, stop in ranges:
                file.seek(start)
                _read_exactly(file, buffer[: stop - start], tensor)
                yield buffer[: stop - start]
        return
    with paths.as_oserror(tensor.file):
        for (start, stop), data in zip(ranges, paths.ranges(tensor.file, ranges), strict=True):
            if len(data) != stop - start:
                raise UserError(f"{tensor.file} ends within {tensor.name!r}; it changed while loading: copy it again.")
            yield np.frombuffer(data, np.uint8)


def _scale(tensor: TensorInfo) -> np.ndarray:
    """fp32, one number or one for each row, of the tensor's rank."""
    if tensor.scale is None:
        return np.ones((1,) * max(len(tensor.shape), 1), np.float32)
    ((_, numbers),) = _strips(tensor.scale)
    return numbers.astype(np.float32).reshape(-1, *(1 for _ in tensor.shape[1:]))


def _read_exactly(file: io.FileIO, part: np.ndarray, tensor: TensorInfo) -> None:
    done = 0
    while done < part.nbytes:
        read = file.readinto(part[done:].data)
        if not read:
            raise UserError(f"{tensor.file} ends within {tensor.name!r}; it changed while loading: copy it again.")
        done += read


def _check_copy(tensor: TensorInfo, copy: TensorInfo) -> None:
    same = (tensor.dtype, tensor.shape, tensor.scale) == (copy.dtype, copy.shape, copy.scale) and all(
        one.tobytes() == other.tobytes() for (_, one), (_, other) in zip(_strips(tensor), _strips(copy), strict=True)
    )
    if not same:
        raise UserError(
            f"{tensor.name!r} in {tensor.file} and {copy.name!r} in {copy.file} are names of one tensor and differ; "
            "use a checkpoint that stores it once."
        )
