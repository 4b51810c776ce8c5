"""Streams tensors from safetensors to the shards of an nnx module.

Each tensor is read in small strips of rows, which are permuted, cast and written straight into the buffers of its
shards. On the CPU these buffers become the parameter itself (jax aliases aligned host memory); on other devices a
stacked parameter is filled one slot at a time on the devices. So the host never holds more than one tensor beside the
parameters that stay on it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from maxdiffusion.errors import UserError
from maxdiffusion.parallel import Placement
from maxdiffusion.runtime import paths
from maxdiffusion.weights.mapping import Assignment, Assignments
from maxdiffusion.weights.sources import TensorSource, strips

log = logging.getLogger(__name__)

# Device kind -> layout of stacked bf16 matrices. Arrays of a TPU7x come in tiles of 8 rows, its programs compute with
# tiles of 16: each step of the 14B model would begin with a copy of all weights, 22 GiB.
MATRICES = {"TPU7x": Layout((0, 1, 2), ((16, 128), (2, 1)))}

ALIASING = ("cpu",)  # platforms whose arrays are the host buffers themselves
_ALIGNMENT = 64  # bytes: XLA's CPU client aliases host buffers so aligned

Box = tuple[tuple[int, int], ...]  # (start, stop) per axis: the part of an array on one device
Module = TypeVar("Module", bound=nnx.Module)
R = TypeVar("R")


def materialize(
    abstract: Module,
    assignments: Assignments,
    placement: Placement | None = None,
    on_tensor: Callable[[int], object] = lambda nbytes: None,
) -> Module:
    """A copy of `abstract` whose parameters hold the checkpoint's weights, each on its devices.

    Args:
      abstract: the network; each parameter gives its shape and dtype and, as metadata, the logical axes that decide its
        sharding. It stays as it is, so that it can be loaded again.
      assignments: the result of `mapping.match` for it.
      placement: None puts everything on jax's default device.
      on_tensor: called with the number of bytes of each tensor once it is read.

    Raises:
      UserError: a file cannot be read or ends early (it changed after its header was checked), or a tensor that is
        stored twice differs from its copy.
    """

    def fill(name: str, leaf: nnx.Variable[Any]) -> jax.Array:
        like = _shape(name, leaf, placement)
        devices: set[Any] = like.sharding.device_set
        aliasing = all(device.platform in ALIASING for device in devices)
        read = _from_host if aliasing or assignments[name][0].layer is None else _slot_by_slot
        array = read(like, assignments[name], on_tensor)
        return array if like.format.layout is None else jax.device_put(array, like.format)

    return _map(fill, abstract)


def placed(abstract: Module, placement: Placement | None) -> Module:
    """A copy of `abstract` whose shapes carry the shardings that `materialize` would give: enough to compile for."""
    return _map(lambda name, leaf: _shape(name, leaf, placement), abstract)


def _map(make: Callable[[str, nnx.Variable[Any]], object], abstract: Module) -> Module:
    """A copy of `abstract` with a new value for each parameter, made from its dotted name and its abstract value."""
    graph, state = nnx.split(abstract)
    leaves = [(path, leaf.replace(make(".".join(map(str, path)), leaf))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def _shape(name: str, leaf: nnx.Variable[Any], placement: Placement | None) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a parameter, and the layout of stacked bf16 matrices where MATRICES has one.

    Split arrays have none: there XLA chooses its own layout, and jax refuses another.
    """
    sharding = _sharding(name, leaf, placement)
    devices: set[Any] = sharding.device_set
    (kind,) = {device.device_kind for device in devices}
    if kind in MATRICES and leaf.dtype == jnp.bfloat16 and len(leaf.shape) == 3 and sharding.is_fully_replicated:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=Format(MATRICES[kind], sharding))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


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


def _slot_by_slot(
    like: jax.ShapeDtypeStruct, assignments: Sequence[Assignment], on_tensor: Callable[[int], object]
) -> jax.Array:
    """A stacked parameter whose slots are copied, one after another, into the array on the devices."""
    stack = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=like.sharding)(like.shape, like.dtype)
    sharding = like.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    slot_like = jax.ShapeDtypeStruct(like.shape[1:], like.dtype, sharding=sharding)

    def read(assignment: Assignment) -> jax.Array:
        return _from_host(slot_like, [dataclasses.replace(assignment, layer=None)], on_tensor)

    for layer, slot in enumerate(_each(read, assignments)):
        stack = _set_slot(stack, slot, layer)
        stack.block_until_ready()  # else the host would run ahead of the copies and hold many slots
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set_slot(stack: jax.Array, slot: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, slot, layer, axis=0)


def _from_host(
    like: jax.ShapeDtypeStruct, assignments: Sequence[Assignment], on_tensor: Callable[[int], object]
) -> jax.Array:
    """An array of `assignments` (one tensor, or all slots of a stack) from one host buffer for each distinct shard."""
    boxes: dict[Any, Box] = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index or (), like.shape, strict=True))
        for device, index in like.sharding.addressable_devices_indices_map(like.shape).items()
    }
    buffers = {box: _aligned(tuple(stop - start for start, stop in box), like.dtype) for box in set(boxes.values())}

    def read(assignment: Assignment) -> int:
        if assignment.layer is None:
            views = list(buffers.items())
        else:
            views = [(box[1:], buffer[assignment.layer - box[0][0]]) for box, buffer in buffers.items()]
        _read(assignment, views)
        return assignment.tensor.nbytes

    for nbytes in _each(read, assignments):
        on_tensor(nbytes)
    arrays = [jax.device_put(buffers[box], device) for device, box in boxes.items()]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, jax.block_until_ready(arrays))


def _each(read: Callable[[Assignment], R], assignments: Sequence[Assignment]) -> Iterator[R]:
    """`map` over the tensors of a parameter, several at once where each waits for a round trip or is computed."""
    first = assignments[0].tensor
    return paths.ahead(read, assignments) if first.computed else paths.each(first.file, read, assignments)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that jax aliases on the CPU; it must not be written to once it is a jax.Array."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _read(assignment: Assignment, views: Sequence[tuple[Box, np.ndarray]]) -> None:
    """Writes each box of the tensor, permuted and cast, into its view; only the rows that the boxes touch are read."""
    tensor, order = assignment.tensor, assignment.rule.transform.value or tuple(range(len(assignment.tensor.shape)))
    for copy in assignment.copies:
        _check_copy(tensor, copy)
    if assignment.rule.reshape or not tensor.shape:
        whole = tensor.rows(0, _count(tensor)).reshape(tensor.shape).transpose(order)
        for box, view in views:
            view[...] = whole.reshape(assignment.shape)[tuple(slice(*part) for part in box)]
        return
    torch_axes = [order.index(axis) for axis in range(len(order))]  # the parameter's axis of each torch axis
    parts = [([box[axis] for axis in torch_axes], view.transpose(torch_axes)) for box, view in views]
    rows = min(box[0][0] for box, _ in parts), max(box[0][1] for box, _ in parts)
    for first, stored in strips(tensor, *rows):
        strip = stored.astype(views[0][1].dtype, copy=False)  # twice as fast as casting while transposing
        for ((start, stop), *rest), view in parts:
            low, high = max(first, start), min(first + len(strip), stop)
            if low < high:
                view[low - start : high - start] = strip[(slice(low - first, high - first), *(slice(*r) for r in rest))]
        del stored, strip  # so that the next one is read into their memory


def _count(source: TensorSource) -> int:
    return source.shape[0] if source.shape else 1


def _check_copy(source: TensorSource, copy: TensorSource) -> None:
    same = (source.dtype, source.shape) == (copy.dtype, copy.shape) and all(
        rows.tobytes() == copy.rows(first, first + len(rows)).tobytes()
        for first, rows in strips(source, 0, _count(source))
    )
    if not same:
        raise UserError(
            f"{source.name!r} in {source.file} and {copy.name!r} in {copy.file} are names of one tensor and differ; "
            "use a checkpoint that stores it once."
        )
