"""The context in which model code asks for a placement: a mesh and the table of logical axes."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes
from maxdiffusion.parallel.rules import DEFAULTS, MeshAxes


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the table that maps logical axes onto it."""

    mesh: Mesh
    rules: Mapping[str, MeshAxes]

    def __hash__(self) -> int:
        return hash((self.mesh, tuple(sorted(self.rules.items()))))

    def spec(self, *logical: str | None) -> PartitionSpec:
        """The PartitionSpec of an array whose dimensions carry the given logical names (None: replicated).

        Raises:
          UserError: a name that no table knows, or a mesh axis that would shard two dimensions of one array.
        """
        unknown = [name for name in logical if name is not None and name not in self.rules and name not in DEFAULTS]
        if unknown:
            raise UserError(f"The logical axis {unknown[0]!r} does not exist; choose one of {', '.join(DEFAULTS)}.")
        parts = tuple(None if name is None else self.rules.get(name) for name in logical)
        used: list[str] = [axis for part in parts if part for axis in ((part,) if isinstance(part, str) else part)]
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
        """Over how many devices a dimension of that name is split."""
        part = self.rules.get(logical) or ()
        return math.prod(self.mesh.shape[axis] for axis in ((part,) if isinstance(part, str) else part))

    def dividing(self, logical: str | None, size: int) -> str | None:
        """The name, or None (held whole) where its devices do not divide a dimension of that size."""
        return None if logical is None or size % self.degree(logical) else logical


_current: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def use(placement: Placement | None) -> Iterator[None]:
    """Makes `placement` the one that `shard` and the attention refer to.

    Its mesh becomes jax's context mesh as well, which is part of the key of `jax.jit`: a function that was traced under
    another mesh is traced again. (Two placements on one mesh with different rules still need two jitted functions.)
    """
    with contextlib.ExitStack() as stack:
        if placement is not None and placement.mesh.size > 1:
            stack.enter_context(jax.sharding.use_abstract_mesh(placement.mesh.abstract_mesh))
        stack.callback(_current.reset, _current.set(placement))
        yield


def current() -> Placement | None:
    return _current.get()


def shard(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains `x` to the current placement; outside of one (a unit test, a single device) it is the identity.

    A batch that does not divide its devices is replicated over them: one prompt is, its guidance pair need not be.
    """
    placement = current()
    if placement is None or placement.mesh.size == 1:
        return x
    if logical[0] == axes.BATCH:
        logical = (placement.dividing(axes.BATCH, x.shape[0]), *logical[1:])
    return jax.lax.with_sharding_constraint(x, placement.sharding(*logical))


def put(x: np.ndarray, *logical: str | None) -> jax.Array:
    """`x`, the same on every host, under the current placement; dimensions without a name are whole."""
    placement = current()
    if placement is None or placement.mesh.size == 1:
        return jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, like(x.shape, x.dtype, *logical).sharding, lambda index: x[index])


def like(shape: Sequence[int], dtype: DTypeLike, *logical: str | None) -> jax.ShapeDtypeStruct:
    """What `put` makes of such an array, described: a dimension that does not divide its devices is whole."""
    placement = current()
    if placement is None:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)
    names = [placement.dividing(name, size) for name, size in zip(logical, shape, strict=False)]
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=placement.sharding(*names))


def gathered(weight: jax.Array, *logical: str | None) -> jax.Array:
    """A weight, stored in parts along its model dim, as matmuls take it: gathered along that dim, just before its use.

    Said nowhere, the compiler might split the activations along that dim instead, or move sums of them.
    """
    placement = current()
    if placement is None or placement.degree(axes.EMBED) == 1 or axes.EMBED not in logical:
        return weight
    kept = [None if axis == axes.EMBED else axis for axis in logical]
    fitting = [placement.dividing(axis, size) for axis, size in zip(kept, weight.shape, strict=True)]
    return jax.lax.with_sharding_constraint(weight, placement.sharding(*fitting))


def data_degree() -> int:
    """Devices of the data axis: how many batches are made side by side."""
    placement = current()
    return 1 if placement is None else placement.mesh.shape[axes.DATA]
