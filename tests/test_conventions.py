"""docs/conventions.md against the table in the code."""

import dataclasses
from pathlib import Path

import pytest

from maxdiffusion.conventions import DIFFUSERS, OFFICIAL, Conventions

DOCUMENT = Path(__file__).parents[1] / "docs" / "conventions.md"
FIELDS = [field.name for field in dataclasses.fields(Conventions) if field.name != "name"]


def rows():
    table = [line.split("|")[1:-1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    return {cells[0].strip().strip("`"): cells[1:] for cells in table}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_documented_with_its_values(field):
    official, diffusers, difference = rows()[field]
    assert official.strip().startswith(f"`{getattr(OFFICIAL, field)}`")
    assert diffusers.strip().startswith(f"`{getattr(DIFFUSERS, field)}`")
    assert difference.strip()


def test_nothing_else_is_documented():
    assert [*rows()] == FIELDS
