"""Reads a network's config.json into its frozen dataclass. Imports no jax."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from maxdiffusion.errors import UserError

C = TypeVar("C")


def _fits(value: Any, hint: Any, *, listed: bool = False) -> bool:
    """Whether a JSON value is of the annotated type: int, float, bool, str, X | None, tuple[X, ...] or tuple[X, X].

    Numbers are positive; in a list of any length an integer, which is an index, may be 0, and others have any sign.
    """
    if get_origin(hint) is types.UnionType:
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if not isinstance(value, list | tuple):
            return False
        if items[-1] is Ellipsis:
            return all(_fits(item, items[0], listed=True) for item in value)
        return len(value) == len(items) and all(map(_fits, value, items))
    if hint in (int, float):
        number = isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
        return number and (value > 0 or (listed and (value == 0 or hint is float)))
    return isinstance(value, hint)


def parse(
    cls: type[C],
    raw: Mapping[str, Any],
    *,
    net: str,
    only: Mapping[str, Collection[Any]],
    ignore_unknown: bool = False,
) -> C:
    """Fills the dataclass `cls` from config.json. Numbers must be positive; keys with a leading underscore are notes.

    `only` gives the supported values of keys that are not fields.

    Raises:
      UserError: a missing field, a value of the wrong type, an unsupported value, or an unknown key (unless
        `ignore_unknown`, for files of a library that stores more than the architecture).
    """
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in raw:
            value = raw[field.name]
            if not _fits(value, hints[field.name]):
                raise UserError(f"The {net}'s config.json gives {field.name}={value!r}, which is not {field.type}.")
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.default is dataclasses.MISSING:
            raise UserError(f"The {net}'s config.json has no {field.name!r}; is it the file of another network?")
    for key, allowed in only.items():
        if key in raw and raw[key] not in allowed:
            legal = " or ".join(repr(value) for value in allowed)
            raise UserError(f"The {net}'s config.json gives {key}={raw[key]!r}; supported is {legal}.")
    unknown = sorted(key for key in raw if not key.startswith("_") and key not in hints and key not in only)
    if unknown and not ignore_unknown:
        raise UserError(f"The {net}'s config.json has keys that are not supported: {', '.join(unknown)}.")
    return cls(**values)
