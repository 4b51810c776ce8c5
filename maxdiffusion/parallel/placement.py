"""The current placement of arrays: a mesh and the rules that map logical axes onto it."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes
from maxdiffusion.parallel.rules import DEFAULTS, MeshAxes

TILE_ROWS = 16  # a multiple of the rows of a tile of bf16 on every TPU


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that map logical axes onto it."""

    mesh: Mesh
    rules: Mapping[str, MeshAxes]

    def __hash__(self) -> int:
        return hash((self.mesh, tuple(sorted(self.rules.items()))))

    def spec(self, *logical: str | None) -> PartitionSpec:
        """The PartitionSpec of an array whose dimensions carry the given logical names (None: replicated).

        Raises:
          UserError: an unknown name, or a mesh axis that would shard two dimensions of one array.
        """
        unknown = [name for name in logical if name not in (None, *self.rules, *DEFAULTS)]
        if unknown:
            raise UserError(f"The logical axis {unknown[0]!r} is unknown; choose one of {', '.join(DEFAULTS)}.")
        parts = [() if name is None else self.rules.get(name, ()) for name in logical]
        used = [axis for part in parts for axis in part]
        twice = sorted({axis for axis in used if used.count(axis) > 1})
        if twice:
            raise UserError(
                f"The logical axes {logical} use the mesh axis {twice[0]!r} twice in one array; "
                "map one of them to another mesh axis or to none."
            )
        return PartitionSpec(*parts)

    def sharding(self, *logical: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*logical))

    def degree(self, logical: str) -> int:
        """The number of devices that a dimension of that name is split over."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.get(logical, ()))

    def dividing(self, logical: str | None, size: int) -> str | None:
        """The name, or None (replicated) if its devices do not divide a dimension of that size."""
        return None if logical is None or size % self.degree(logical) else logical


_current: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def use(placement: Placement | None) -> Iterator[None]:
    """Makes `placement` the current one, which `shard` and attention use.

    Its mesh becomes jax's context mesh too, which is part of the cache key of `jax.jit`: a function that was traced
    under another mesh is traced again. Two placements on one mesh with different rules need two jitted functions.
    """
    with contextlib.ExitStack() as stack:
        if placement is not None and placement.mesh.size > 1:
            stack.enter_context(jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh))
        stack.callback(_current.reset, _current.set(placement))
        yield


def current() -> Placement | None:
    return _current.get()


def first_device() -> Any:
    """The first device of the current placement (a `jax.Device` or a description), else of jax."""
    placement = current()
    return jax.devices()[0] if placement is None else placement.mesh.devices.flat[0]


def shard(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains the sharding of `x` by the current placement; returns `x` without one or on a single device.

    A batch that does not divide over its devices is replicated.
    """
    placement = current()
    if placement is None or placement.mesh.size == 1:
        return x
    if logical[0] == axes.BATCH:
        logical = (placement.dividing(axes.BATCH, x.shape[0]), *logical[1:])
    return jax.lax.with_sharding_constraint(x, placement.sharding(*logical))


def put(x: np.ndarray, *logical: str | None) -> jax.Array:
    """Puts `x`, the same on every host, on the devices of the current placement; unnamed dimensions are replicated."""
    placement = current()
    if placement is None or placement.mesh.size == 1:
        return jax.device_put(x)  # jnp.asarray compiles a copy for each shape (jax 0.10.2)
    return jax.make_array_from_callback(x.shape, like(x.shape, x.dtype, *logical).sharding, lambda index: x[index])


def like(shape: Sequence[int], dtype: DTypeLike, *logical: str | None) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of `put`'s result; a dimension that does not divide over its devices is replicated."""
    placement = current()
    if placement is None:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)
    names = [placement.dividing(name, size) for name, size in zip(logical, shape, strict=False)]
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=placement.sharding(*names))


def gathered(weight: jax.Array, *logical: str | None) -> jax.Array:
    """Gathers a weight along its model dim, over which it is stored in shards, just before its use.

    Without this constraint the compiler might shard the activations along that dim, or reduce partial sums of them.
    """
    placement = current()
    if placement is None or placement.degree(axes.EMBED) == 1 or axes.EMBED not in logical:
        return weight
    kept = [None if axis == axes.EMBED else axis for axis in logical]
    fitting = [placement.dividing(axis, size) for axis, size in zip(kept, weight.shape, strict=True)]
    return jax.lax.with_sharding_constraint(weight, placement.sharding(*fitting))


def per_device(
    function: Callable[..., Any],
    arrays: Sequence[Any],
    names: Sequence[Sequence[str | None]],
    result: Sequence[str | None],
) -> Any:
    """Calls `function` on every device with its shards of `arrays`, which may be trees or None.

    XLA does not partition calls of Pallas kernels. `names` are the logical names of each array's dimensions, `result`
    those of every array of the result; a dimension of the first array that does not divide over its devices is whole on
    each.
    """
    placement = current()
    if placement is None:
        return function(*arrays)

    def fitting(names: Sequence[str | None], shape: Sequence[int]) -> list[str | None]:
        return [placement.dividing(name, size) for name, size in zip(names, shape, strict=True)]

    specs = tuple(
        jax.tree.map(lambda array, names=own: placement.spec(*fitting(names, array.shape)), tree)
        for tree, own in zip(arrays, names, strict=True)
    )
    first = fitting(names[0], arrays[0].shape)
    out = placement.spec(*(name if name in first else None for name in result))
    # check_vma=False: Pallas kernels do not declare the mesh axes over which their results vary.
    return jax.shard_map(function, mesh=placement.mesh, in_specs=specs, out_specs=out, check_vma=False)(*arrays)


def degree(logical: str) -> int:
    """Devices over which the current placement splits a dimension of that name."""
    placement = current()
    return 1 if placement is None else placement.degree(logical)


def token_multiple() -> int:
    """Number that the count of the video's tokens is padded to a multiple of.

    The devices of their axis, on TPUs times `TILE_ROWS`: all-to-alls and permutations of partly filled tiles are copied
    before and after (docs/tpu_layouts.md).
    """
    devices = degree(axes.SEQUENCE)
    return devices * TILE_ROWS if devices > 1 and first_device().platform == "tpu" else devices


def data_degree() -> int:
    """Devices of the data axis: the number of batches that run at the same time."""
    placement = current()
    return 1 if placement is None else placement.mesh.shape[axes.DATA]
