"""Whole runs through the entry page."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory) -> Path:
    """A tiny random checkpoint of the official architecture, with 16 latent channels and heads of 12."""
    folder = tmp_path_factory.mktemp("random")
    script = runpy.run_path(str(ROOT / "scripts" / "make_random_checkpoint.py"))
    script["main"]([str(folder), "--preset", "tiny"])
    return folder


@pytest.fixture(scope="session")
def speaker(tmp_path_factory) -> Path:
    """A tiny random checkpoint of S2V."""
    from tests.support import official_s2v  # torch, which most of these tests do without

    return official_s2v.write_checkpoint(tmp_path_factory.mktemp("speaker") / "checkpoint")


@pytest.fixture(scope="session")
def dancer(tmp_path_factory) -> Path:
    """A tiny random checkpoint of Animate 2."""
    from tests.support import animate2

    return animate2.write_checkpoint(tmp_path_factory.mktemp("dancer") / "checkpoint", animate2.transformer())


@pytest.fixture(scope="session")
def bundled() -> Path:
    return ROOT / "models" / "wan_tiny"
