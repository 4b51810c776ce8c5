"""The bundled pages: the YAML files of configs/, in the installed package or in the checkout around it."""

from __future__ import annotations

from pathlib import Path

import maxdiffusion

_PACKAGE = Path(maxdiffusion.__file__).parent
# setup.py copies configs/ and models/ into the wheel below maxdiffusion/bundled, side by side as in the checkout.
_INSTALLED = _PACKAGE / "bundled" / "configs"
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """The names of all pages, such as `wan2.1_t2v_14b` and `v6e-8/wan2.1_vace_14b`."""
    return sorted(file.relative_to(FOLDER).as_posix().removesuffix(".yml") for file in FOLDER.rglob("*.yml"))


def path(name: str) -> Path | None:
    """The file of the page of that name; None where there is none."""
    return FOLDER / f"{name}.yml" if name in names() else None
