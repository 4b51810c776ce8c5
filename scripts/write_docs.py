"""Writes docs/keys.md and docs/dialects.md from the schema and the table of official and diffusers names.

python scripts/write_docs.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from maxdiffusion.config import dialects, help, schema

DOCS = Path(__file__).parents[1] / "docs"


def keys() -> str:
    """docs/keys.md."""
    lines = [
        "# Keys",
        "",
        "Every key of a page and of the command line (`key=value`, or `--key value`), by group. A key without a",
        "default takes the variant's or none; `generate_wan --help KEY` shows each variant's, `--help GROUP` a group.",
        "A list is written `'[one, two]'`, an empty value `key=`. Made by `python scripts/write_docs.py`.",
    ]
    for group in help.groups():
        lines += ["", f"## {group}", ""]
        for key, of, default, about in schema.rows():
            if of == group:
                kind = schema.type_name(key) + (f", default `{default}`" if default else "")
                lines += [f"- **`{key}`** ({kind}): {_without_choices(key, about)}."]
    return "\n".join(lines) + "\n"


def _without_choices(key: str, about: str) -> str:
    """The help of a key without the choices, which are its type."""
    return about.replace(f" [{' '.join(schema.choices(key))}]", "")


def names() -> str:
    """docs/dialects.md."""
    lines = [
        "# Three dialects",
        "",
        "The same settings in this project, in the official repositories (`generate.py` of Wan2.1 and Wan2.2) and in",
        "diffusers 0.42.1. The official names work here too, also as options, so that a line of the official command",
        "can be pasted behind `generate_wan`:",
        "",
        "```sh",
        "generate_wan --task t2v-A14B --size 1280*720 --sample_steps 30 --base_seed 7 --convert_model_dtype --prompt "
        '"Two cats box on a stage."',
        "```",
        "",
        "Of diffusers' names those of a pipeline's call stand alone. Made by `python scripts/write_docs.py`.",
        "",
        *table(("key", "official", "diffusers"), (map(code, row) for row in dialects.rows())),
        "",
        "Some of these official names stand for several keys, or have values of their own:",
        "",
        *(f"- `{name}`: {about}" for name, about in schema.COMPOUND_ALIASES.items()),
        "",
        "Values with other names: "
        + "; ".join(
            f"`{key.alias or name}={theirs}` is `{name}={ours}`"
            for name, key in schema.KEYS.items()
            for theirs, ours in key.values.items()
        )
        + ".",
        "",
        "## Tasks",
        "",
        "`--task` chooses the page; `t2i-14B` also sets `num_frames=1`.",
        "",
        *table(("--task", "page"), ((code(task), code(page)) for task, page in dialects.TASKS.items())),
        "",
        "## Official flags that no key takes",
        "",
        "They are accepted, and the log says in one line what serves instead.",
        "",
        *table(("flag", "instead"), ((code(flag), instead) for flag, instead in dialects.SERVED_BY.items())),
    ]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table."""
    escaped = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {row} |" for row in escaped)]


def code(names: str) -> str:
    """Comma-separated names as code, each by itself."""
    return (
        ", ".join(f"`{name}`" for name in names.split(", ")) if "(" not in names and names else names and f"`{names}`"
    )


PAGES = {"keys.md": keys, "dialects.md": names}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
