"""Every test runs with the shape annotations of the package executed."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

# Eight virtual devices for the tests of meshes; what uses none runs on the first, as fast as alone (measured).
# Set here and not by XLA_FLAGS, so that commands started by tests see one device.
jax.config.update("jax_num_cpu_devices", 8)

install_import_hook("maxdiffusion", "beartype.beartype")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write the golden files instead of comparing")


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    """A run sets up the package's logger, also one of a fixture; the next test reads it as pytest leaves it."""
    yield
    logger = logging.getLogger("maxdiffusion")
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


QUICK = tuple(Path(__file__).parent / name for name in ("attention", "denoise", "kernels", "models"))


@pytest.fixture(autouse=True)
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Modules alone are compiled without XLA's costly passes, as jax tests itself: half of the time in test_vae."""
    jax.config.update("jax_disable_most_optimizations", any(folder in request.path.parents for folder in QUICK))
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Asserts that a text equals the file of the given name below tests/golden/."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        update = f"pytest {request.node.nodeid.split('::')[0]} --update-goldens"
        assert path.exists(), f"no golden file {path}; if this result is right, run: {update}"
        assert text == path.read_text(encoding="utf-8"), f"differs from {path}; if this result is right, run: {update}"

    return compare
