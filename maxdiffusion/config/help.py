"""The text of --help, made from the schema."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Sequence

from maxdiffusion import variants
from maxdiffusion.config import dialects, pages, schema
from maxdiffusion.errors import UserError

USAGE = """\
usage: generate_wan PAGE [key=value ...]     PAGE: a YAML file, or the name of a bundled one
       generate_wan list [WORD]              the bundled pages and what each needs
       generate_wan --help [GROUP|KEY|PAGE]  all keys, or one group, key or page
       generate_wan completion bash|zsh      a script that completes keys and values"""


def text(topics: Sequence[str] = (), width: int = 110) -> str:
    """Every key with default and help, by group; with `topics` (groups, keys, official names, pages) these alone.

    Raises:
      UserError: there is no such group, key or page.
    """
    if topics:
        return "\n\n".join(_topic(topic, width) for topic in topics)
    lines = [USAGE, "", "Makes a video from a prompt. A key on the command line wins over the page.", ""]
    said = f"--key value is another spelling of key=value. The groups are: {', '.join(groups())}."
    lines += [*textwrap.wrap(said, width), ""]
    for group in groups():
        lines += [*_group(group, width), ""]
    lines += ["also accepted:", *(_row(name, about, width) for name, about in schema.COMPOUND_ALIASES.items())]
    lines += [_row("task", f"the page, by the official name: {', '.join(dialects.TASKS)}", width), ""]
    lines += textwrap.wrap(f"variants (model_name): {', '.join(variants.VARIANTS)}", width, subsequent_indent="  ")
    lines += ["Keys without a default take the variant's. A list is written '[one, two]', an empty value as key="]
    return "\n".join(lines)


def groups() -> list[str]:
    """The groups of keys, in the order of the schema."""
    return list(dict.fromkeys(key.group for key in schema.KEYS.values()))


def _topic(name: str, width: int) -> str:
    key = name.removeprefix("--").replace("-", "_")
    key = schema.ALIASES.get(key, key)
    if found := [group for group in groups() if key in (group, *group.split())]:
        return "\n".join(_group(found[0], width))
    if key in schema.KEYS:
        return "\n".join([*_rows((row for row in schema.rows() if row[0] == key), width), *_names(key, width)])
    if key in schema.COMPOUND_ALIASES:
        return _row(key, schema.COMPOUND_ALIASES[key], width)
    if key in dialects.SERVED_BY:
        return _row(key, f"not used; {dialects.SERVED_BY[key]}", width)
    if page := pages.path(name):
        return page.read_text(encoding="utf-8").rstrip()
    known = [*groups(), *schema.KEYS, *schema.ALIASES, *schema.COMPOUND_ALIASES, *pages.names()]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    raise UserError(f"--help {name}: no group, key or page has that name; did you mean {near}?")


def _names(key: str, width: int) -> list[str]:
    """What else there is to say of one key: its type, its defaults by variant, its names elsewhere."""
    lines = {"type": schema.type_name(key)}
    if schema.KEYS[key].from_variant and key not in _LONG:
        specs = [spec for spec in variants.VARIANTS.values() if spec.hub_id]
        values = {
            getattr(spec, key): [each.name for each in specs if getattr(each, key) == getattr(spec, key)]
            for spec in specs
        }
        lines["default"] = "; ".join(
            f"{value} ({', '.join(names)})" for value, names in values.items() if value is not None
        )
    _, official, diffusers = next((row for row in dialects.rows() if row[0] == key), (key, "", ""))
    lines |= {"official name": official, "diffusers": diffusers}
    return [_row(f"  {name}", value, width) for name, value in lines.items() if value]


_LONG = {"prompt", "negative_prompt"}  # of which each variant has a page of text


def _group(group: str, width: int) -> list[str]:
    return [f"{group}:", *_rows((row for row in schema.rows() if row[1] == group), width)]


def _rows(rows: Iterable[tuple[str, str, str, str]], width: int) -> list[str]:
    return [_row(f"{key}={default}", about, width) for key, _, default, about in rows]


def _row(name: str, about: str, width: int) -> str:
    body = textwrap.wrap(about, width - 36)
    first = f"  {name:<34}" if len(name) <= 33 else f"  {name}\n{'':36}"
    return first + f"\n{'':36}".join(body)
