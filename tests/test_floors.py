"""The floors of the house: no folder imports one above it, and the library below knows no config."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import maxdiffusion

PACKAGE = Path(maxdiffusion.__file__).parent

# From the ground up; a folder, or a file directly below the package, imports those before it only.
LIBRARY = (
    "__init__",
    "errors",
    "conventions",
    "hardware",
    "runtime",
    "media",
    "parallel",
    "kernels",
    "attention",
    "models",
    "variants",
    "denoise",
    "weights",
)
APPLICATION = (
    "config",
    "request",
    "conditioning",
    "output",
    "programs",
    "sampling",
    "planning",
    "tuning",
    "generate_wan",
    "verify",
    "comparison",
    "inspection",
    "cli",
)
FLOORS = LIBRARY + APPLICATION


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The folders and files of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively, which this test does not read"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "maxdiffusion" and rest and rest[0] != "__version__":
                yield rest[0]


def test_every_folder_has_a_floor() -> None:
    entries = {floor_of(path) for path in PACKAGE.rglob("*.py")}
    assert entries == set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_nothing_imports_upwards(floor: str) -> None:
    files = [path for path in PACKAGE.rglob("*.py") if floor_of(path) == floor]
    up = {
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in files
        for other in imported(path)
        if FLOORS.index(other) > FLOORS.index(floor)
    }
    assert not up


def test_the_library_knows_no_config() -> None:
    for path in PACKAGE.rglob("*.py"):
        if floor_of(path) in LIBRARY:
            assert not set(imported(path)) & set(APPLICATION), path


def test_no_test_imports_another() -> None:
    """What tests share is in tests/support."""
    tests = Path(__file__).parent
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tests":
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                assert not any(part.startswith("test_") for name in names for part in name.split(".")), path
