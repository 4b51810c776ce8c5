"""A file of one JSON object per line, each the words of one video: what it says wins over the config."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.runtime.paths import expanded, reach

KEYS = ("prompt", "negative_prompt", "seed", "image", "last_image", "size", "width", "height", "output")

_SIZE = re.compile(r"\s*(\d+)\s*[*xX×]\s*(\d+)\s*")


def read(
    path: str, defaults: Mapping[str, Any], ending: str, named: Callable[[Mapping[str, Any]], str]
) -> list[dict[str, Any]]:
    """For each line, `defaults` with what it overrides.

    Args:
      path: the file.
      defaults: prompt, negative_prompt, seed, image, last_image, width, height.
      ending: of the output's format, which `output` may carry and loses.
      named: the name of the output of a line that gives none.

    Raises:
      UserError: the file cannot be read or has no line; a line is no JSON object, has an unknown or repeated key or a
        value that cannot be meant, or names the output of another. It says the line's number.
    """
    try:
        text = reach(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"prompts={path} cannot be read ({error.strerror or error}); give a file of JSON lines."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"prompts={path} is not UTF-8 text; give a file of JSON lines.") from None
    lines: list[dict[str, Any]] = []
    taken: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        found = {**defaults, **dict(_overrides(_object(line, where), where))}
        if not found["prompt"].strip():
            raise UserError(f'{where} has no prompt and the config gives none; write {{"prompt": "a red circle"}}.')
        found["output"] = _name(found["output"], ending, where) if found["output"] else named(found)
        if found["output"].casefold() == manifest_stem(path).casefold():
            raise UserError(
                f"{where} gives output={found['output']!r}, the name of the file of what is done; choose another."
            )
        other = taken.setdefault(found["output"].casefold(), number)
        if other != number:
            raise UserError(
                f"{where} and line {other} would both be written as {found['output']!r}; give one of them another "
                '"output".'
            )
        lines.append(found)
    if not lines:
        raise UserError(f'prompts={path} holds no line; write one JSON object per line, {{"prompt": "a red circle"}}.')
    return lines


def manifest_stem(path: str) -> str:
    """The name, without its suffix, of the file that tells what of the prompt file `path` is done."""
    return f"{PurePath(path).stem}.manifest"


def _object(line: str, where: str) -> list[tuple[str, Any]]:
    """The pairs of a line's object."""
    try:
        pairs = json.loads(line, object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error}); each line is one object in braces.") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs) or line.lstrip()[0] != "{":
        raise UserError(f'{where} is no JSON object; write {{"prompt": "a red circle", "seed": 7}}.')
    return pairs


def _overrides(pairs: list[tuple[str, Any]], where: str) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for key, value in pairs:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
            raise UserError(f"{where} has the key {key!r}; did you mean {near!r}? (known: {', '.join(KEYS)})")
        given = {"width", "height"} if key == "size" else {key}
        if given & seen:
            raise UserError(f"{where} gives {' and '.join(sorted(given & seen))} twice; keep one.")
        seen |= given
        if key == "size":
            match = _SIZE.fullmatch(value) if isinstance(value, str) else None
            if not match:
                raise UserError(f"{where} gives size={value!r}; write width*height, width first, such as '832*480'.")
            yield from {"width": int(match[1]), "height": int(match[2])}.items()
            continue
        kind = int if key in ("seed", "width", "height") else str
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{where} gives {key}={value!r}, which is no {'integer' if kind is int else 'text'}.")
        if key == "seed" and not 0 <= int(value) < 2**32:
            raise UserError(f"{where} gives seed={value}; it must be from 0 to {2**32 - 1}.")
        if key in ("image", "last_image"):
            value = expanded(str(value), f"{where}: {key}") or None
        yield key, value


def _name(given: str, ending: str, where: str) -> str:
    name = given[: -len(ending) - 1] if given.lower().endswith(f".{ending}") else given
    if not name or name.startswith(".") or re.search(r"[/\\\x00-\x1f\ud800-\udfff]", name) or len(name.encode()) > 120:
        raise UserError(
            f"{where} gives output={given!r}, which names no file below output_dir/run_name; write a name without "
            "slashes, of at most 120 bytes."
        )
    return name
