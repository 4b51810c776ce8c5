"""The text of --help, made from the schema."""

from __future__ import annotations

import itertools
import textwrap

from maxdiffusion import variants
from maxdiffusion.config import schema

USAGE = "usage: generate_wan CONFIG.yml [key=value ...]"


def text(width: int = 110) -> str:
    """Every key with default and help, by group."""
    lines = [USAGE, "", "Makes a video from a prompt. A key on the command line wins over the YAML file.", ""]
    for group, rows in itertools.groupby(schema.rows(), key=lambda row: row[1]):
        lines += [f"{group}:", *(_row(f"{key}={default}", about, width) for key, _, default, about in rows), ""]
    lines += ["also accepted:", *(_row(name, about, width) for name, about in schema.COMPOUND_ALIASES.items()), ""]
    lines += textwrap.wrap(f"variants (model_name): {', '.join(variants.VARIANTS)}", width, subsequent_indent="  ")
    lines += ["Keys without a default take the variant's. A list is written '[one, two]', an empty value as key="]
    return "\n".join(lines)


def _row(name: str, about: str, width: int) -> str:
    body = textwrap.wrap(about, width - 36)
    first = f"  {name:<34}" if len(name) <= 33 else f"  {name}\n{'':36}"
    return first + f"\n{'':36}".join(body)
