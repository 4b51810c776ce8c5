"""The table logical axis -> mesh axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes

MeshAxes = str | tuple[str, ...] | None

# One table for every attention scheme: they differ in what they do with the context axis, not in what lies on it.
DEFAULTS: Mapping[str, MeshAxes] = {
    axes.BATCH: (axes.DATA, axes.FSDP),
    axes.SEQUENCE: axes.CONTEXT,
    axes.HEADS: axes.TENSOR,
    axes.WIDTH: axes.CONTEXT,
    axes.EMBED: axes.FSDP,
    axes.MLP: axes.TENSOR,
    axes.VOCAB: axes.TENSOR,
    axes.LAYERS: None,
}


def rules_for(overrides: Sequence[tuple[str, str | Sequence[str] | None]] = ()) -> dict[str, MeshAxes]:
    """The built-in table, with the config's `logical_axis_rules` on top: pairs of a logical and one or more mesh axes.

    `context` stands for ring and ulysses, an empty list or None for "not sharded".

    Raises:
      UserError: a logical or mesh axis that does not exist, or a logical axis given twice.
    """
    table = dict(DEFAULTS)
    seen: set[str] = set()
    for logical, mesh in overrides:
        if logical not in DEFAULTS:
            raise UserError(
                f"logical_axis_rules names the logical axis {logical!r}, which does not exist; choose one of "
                f"{', '.join(DEFAULTS)}."
            )
        if logical in seen:
            raise UserError(f"logical_axis_rules names the logical axis {logical!r} twice; keep one of them.")
        seen.add(logical)
        table[logical] = _mesh_axes(logical, mesh)
    return table


def _mesh_axes(logical: str, mesh: str | Sequence[str] | None) -> MeshAxes:
    names = () if mesh is None else (mesh,) if isinstance(mesh, str) else tuple(mesh)
    expanded = [axis for name in names for axis in (axes.CONTEXT if name == "context" else (name,))]
    for axis in expanded:
        if axis not in axes.MESH_AXES:
            raise UserError(
                f"logical_axis_rules maps {logical!r} to the mesh axis {axis!r}, which does not exist; choose from "
                f"{', '.join(axes.MESH_AXES)} or context."
            )
        if expanded.count(axis) > 1:
            raise UserError(f"logical_axis_rules maps {logical!r} to the mesh axis {axis!r} twice; once is enough.")
    if len(expanded) == 1 and not (isinstance(mesh, str) and mesh == "context"):
        return expanded[0]
    return tuple(expanded) or None
