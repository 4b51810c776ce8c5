"""A file of one JSON object per line, each a video; its keys override the config."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from maxdiffusion.config.parse import parse_size
from maxdiffusion.errors import UserError
from maxdiffusion.runtime.paths import check_file, expanded, probe

TYPES: dict[str, Any] = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "image": str,
    "last_image": str,
    "size": str,
    "width": int,
    "height": int,
    "output": str,
    "lora": (str, list, dict),
    "lora_2": (str, list, dict),
}
OF_THE_RUN = ("lora", "lora_2")  # keys of the model, which all lines must give alike


def read(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(file and line number, what the line gives) of each line: fields of its `Video`, `size` and keys OF_THE_RUN.

    `size` is two integers.

    Raises:
      UserError: the file cannot be read or has no line; a line is not a JSON object, has an unknown or repeated key, or
        a value of another type. It says the line's number.
    """
    check_file(probe(path), f"prompts={path}")
    try:
        text = probe(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"prompts={path} cannot be read ({error.strerror or error}); give a file of JSON lines."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"prompts={path} is not UTF-8 text; give a file of JSON lines.") from None
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise UserError(f'prompts={path} holds no line; write one JSON object per line, {{"prompt": "a red circle"}}.')
    return [(where, dict(_overrides(_object(line, where), where))) for where, line in numbered]


def manifest_stem(path: str) -> str:
    """The name, without its suffix, of the file that lists the finished videos of the prompt file `path`."""
    return f"{PurePath(path).stem}.manifest"


def _object(line: str, where: str) -> list[tuple[str, Any]]:
    """The pairs of a line's object."""
    try:
        pairs = json.loads(line, object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); each line is one object in braces.") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs) or line.lstrip()[0] != "{":
        raise UserError(f'{where} is not a JSON object; write {{"prompt": "a red circle", "seed": 7}}.')
    return pairs


def _overrides(pairs: list[tuple[str, Any]], where: str) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for key, value in pairs:
        if key not in TYPES:
            near = difflib.get_close_matches(key, TYPES, n=1, cutoff=0.0)[0]
            raise UserError(f"{where} has the key {key!r}; did you mean {near!r}? (known: {', '.join(TYPES)})")
        given = {"width", "height"} if key == "size" else {key}
        if given & seen:
            raise UserError(f"{where} gives {' and '.join(sorted(given & seen))} twice; keep one.")
        seen |= given
        if key == "size":
            if not (size := parse_size(value)):
                raise UserError(f"{where} gives size={value!r}; write width*height, width first, such as '832*480'.")
            yield key, tuple(map(int, size))
            continue
        if key in OF_THE_RUN:
            value = _files(value, f"{where}: {key}")
        if not isinstance(value, TYPES[key]) or isinstance(value, bool):
            what = {int: "an integer", str: "text"}.get(TYPES[key], "a file, a list of files or an object of strengths")
            raise UserError(f"{where} gives {key}={value!r}, which is not {what}.")
        if key == "seed" and not -1 <= value < 2**32:
            raise UserError(f"{where} gives seed={value}; it must be from 0 to {2**32 - 1}, or -1 to draw one.")
        if key in ("image", "last_image"):
            value = expanded(value, f"{where}: {key}") or None
        yield key, value


def _files(value: Any, what: str) -> Any:
    """Paths expanded; an object, which is read as its pairs, as a mapping."""
    if isinstance(value, str):
        return expanded(value, what)
    if not isinstance(value, list):
        return value
    pairs = [pair for pair in value if isinstance(pair, tuple)]
    if not pairs:
        return [expanded(file, what) if isinstance(file, str) else file for file in value]
    mapping = {expanded(file, what): strength for file, strength in pairs}
    if len(mapping) < len(pairs):
        raise UserError(f"{what} names a file twice; keep one.")
    return mapping
