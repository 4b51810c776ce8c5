"""The rules: logical axis -> mesh axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes

MeshAxes = tuple[str, ...]  # empty: not sharded

# The same rules for every attention scheme: all of them shard the same dimensions over the context axis.
DEFAULTS: Mapping[str, MeshAxes] = {
    axes.BATCH: (axes.DATA, axes.FSDP),
    axes.SEQUENCE: axes.CONTEXT,
    axes.HEADS: (axes.TENSOR,),
    axes.WIDTH: axes.CONTEXT,
    axes.EMBED: (axes.FSDP,),
    axes.MLP: (axes.TENSOR,),
    axes.VOCAB: (axes.TENSOR,),
    axes.LAYERS: (),
}


def rules_for(overrides: Sequence[tuple[str, str | Sequence[str] | None]] = ()) -> dict[str, MeshAxes]:
    """The default rules, overridden by the config's `logical_axis_rules`: pairs of a logical and one or more mesh axes.

    `context` stands for ring and ulysses; an empty list or None means not sharded.

    Raises:
      UserError: an unknown logical or mesh axis, or one that is given twice.
    """
    given: dict[str, MeshAxes] = {}
    for logical, mesh in overrides:
        if logical not in DEFAULTS:
            raise UserError(
                f"logical_axis_rules names the logical axis {logical!r}, which is unknown; choose one of "
                f"{', '.join(DEFAULTS)}."
            )
        if logical in given:
            raise UserError(f"logical_axis_rules names the logical axis {logical!r} twice; keep one of them.")
        given[logical] = _mesh_axes(logical, mesh)
    return {**DEFAULTS, **given}


def _mesh_axes(logical: str, mesh: str | Sequence[str] | None) -> MeshAxes:
    names = () if mesh is None else (mesh,) if isinstance(mesh, str) else tuple(mesh)
    expanded = tuple(axis for name in names for axis in (axes.CONTEXT if name == "context" else (name,)))
    for axis in expanded:
        if axis not in axes.MESH_AXES:
            raise UserError(
                f"logical_axis_rules maps {logical!r} to the mesh axis {axis!r}, which is unknown; choose from "
                f"{', '.join(axes.MESH_AXES)} or context."
            )
        if expanded.count(axis) > 1:
            raise UserError(f"logical_axis_rules maps {logical!r} to the mesh axis {axis!r} twice; once is enough.")
    return expanded
