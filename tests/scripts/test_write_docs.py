"""The generated pages of docs/ are current."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "write_docs.py"))


@pytest.mark.parametrize("name", SCRIPT["PAGES"])
def test_the_page_is_current(name: str) -> None:
    made = SCRIPT["PAGES"][name]()
    assert made == (ROOT / "docs" / name).read_text(encoding="utf-8"), "run: python scripts/write_docs.py"


def test_every_row_of_a_table_has_as_many_cells_as_its_head() -> None:
    for make in SCRIPT["PAGES"].values():
        cells = None
        for line in make().splitlines():
            count = line.replace("\\|", "").count("|")
            assert not count or cells in (None, count), line
            cells = count or None
