"""Scripts are run as `python scripts/NAME.py`, where only their own folder is on the path."""

import re
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "scripts").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_finds_the_package(script):
    text = script.read_text()
    imported = re.search(r"^(from|import) maxdiffusion", text, re.MULTILINE)
    assert imported is None or "sys.path.insert" in text[: imported.start()], "python scripts/ cannot import it"
