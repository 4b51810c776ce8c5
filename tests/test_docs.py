"""The commands of README.md and docs/ are ones that the program takes, and links lead to files."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import cli, request
from maxdiffusion.media.write import write
from tests.support.bucket import bucket

__all__ = ["bucket"]  # a fixture

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"(?:\.venv/bin/)?(?:python )?generate_wan(?:\.py)? ")
LINES = {"lines.jsonl": '{"prompt": "a red circle moving left on a navy background", "seed": 7}\n'}


def commands(page: Path) -> list[str]:
    """The lines of its shell blocks that start the program, continued ones joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if PROGRAM.match(line)]


def words(command: str) -> list[str]:
    """The arguments of a command."""
    return shlex.split(command, comments=True)[1 + command.lstrip().startswith(("python ", ".venv")) :]


@pytest.fixture
def place(tmp_path, monkeypatch, bucket) -> Path:
    """A folder with the checkout's configs and models, in which the files that commands name exist."""
    for name in ("configs", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, text in LINES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def provide(folder: Path, word: str) -> None:
    """Makes the picture or the video that a word names."""
    path = folder / word.split("=", 1)[-1]
    if path.suffix in (".png", ".jpg") and not path.exists():
        Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(path)
    elif path.suffix == ".mp4" and not path.exists():
        write(np.full((17, 64, 64, 3), 128, np.uint8), path, 16, "mp4", {})


CASES = [pytest.param(command, id=f"{page.name}: {command}") for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("command", CASES)
def test_a_command_is_one_that_the_program_takes(place, command):
    given = words(command)
    if given[0] in ("list", "completion") or given[0].startswith("-"):
        pytest.skip("a word of the program itself, or dashes; tests/config runs them")
    for word in given[1:]:
        provide(place, word)
    if given[1:] and not any(word.startswith(("prompt=", "prompts=", "image=", "decode_latents=")) for word in given):
        assert any(word.startswith(("inspect=", "plan=", "verify=")) for word in given)
    request.load(given)


MINIATURES = {
    page: tiny
    for page in PAGES
    if (tiny := [each for each in commands(page) if "wan_tiny" in each and "coordinator_address" not in each])
}


@pytest.mark.slow
@pytest.mark.parametrize("page", MINIATURES, ids=lambda page: page.name)
def test_the_commands_of_a_page_that_need_no_download_run(place, page):
    for command in MINIATURES[page]:
        for word in words(command)[1:]:
            provide(place, word)
        assert cli.command([*words(command), "progress=off"]) == 0, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


def test_the_readme_is_short_and_every_page_is_linked():
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    linked = {each for page in PAGES for each in re.findall(r"\]\((?:docs/)?([\w]+\.md)", page.read_text())}
    assert {page.name for page in PAGES[1:]} <= linked


def test_cells_of_tables_are_no_longer_than_a_line():
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("|"):
                assert max(len(cell) for cell in re.split(r"(?<!\\)[|]", line)) <= 140, (page.name, line)
