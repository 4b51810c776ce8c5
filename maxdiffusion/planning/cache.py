"""Plans and figures of programs, kept beside the compile cache. Imports no jax."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import pydantic

import maxdiffusion
from maxdiffusion.config import schema
from maxdiffusion.errors import UserError
from maxdiffusion.request import Job
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.atomic import atomic_path

T = TypeVar("T")

_ROOT = Path(maxdiffusion.__file__).parent
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "tokamax", "numpy")
# The files that set the compiler's options or read compiled programs.
_READERS = (
    _ROOT / "parallel" / "compiler.py",
    *(_ROOT / "planning" / name for name in ("schedule.py", "predict.py", "worker.py")),
    *(_ROOT / "hardware" / name for name in ("links.py", "chips.py")),
)


class Cache:
    """JSON files by digest, beside `jax_cache_dir`; without such a folder, nothing is kept."""

    def __init__(self, jax_cache_dir: str):
        """Resolves the folder.

        Raises:
          UserError: it cannot be reached.
        """
        on = jax_cache_dir not in ("", "none")
        self._folder = paths.probe(os.path.expanduser(jax_cache_dir)).parent / "plans" if on else None

    def read(self, name: str, kind: type[T]) -> T | None:
        """The value of that name; None where there is none, or its file does not hold a `kind`."""
        if self._folder is None:
            return None
        try:
            return pydantic.TypeAdapter(kind).validate_json((self._folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, name: str, value: object) -> str:
        """Keeps a dataclass or model, whole or not at all; returns the reason if that fails, else an empty string."""
        if self._folder is None:
            return ""
        try:
            with atomic_path(self._folder / f"{name}.json", overwrite=True) as path:
                path.write_bytes(pydantic.TypeAdapter(type(value)).dump_json(value, indent=1))
        except (OSError, UserError) as error:
            return str(error)
        return ""


def asked(job: Job, configs: Any, devices: object) -> str:
    """The digest of all that a plan of `job` depends on."""
    keys = {key: value for key, value in job.cfg.to_json().items() if schema.KEYS[key].of_the_program}
    shapes = sorted(video.shape for video in job.videos)
    return _digest(sorted(_ROOT.rglob("*.py")), "plan", keys, shapes, len(job.prompts(guided=True)), configs, devices)


def program(name: str, text: str, devices: str) -> str:
    """The digest of a program, its devices, the compiler and the code that reads the result."""
    return _digest(_READERS, "program", name, text, devices)


def _digest(files: Iterable[Path], *parts: object) -> str:
    """Hashes the contents of source files, the versions of packages and the repr of other values."""
    contents = [(str(file.relative_to(_ROOT)), hashlib.sha256(file.read_bytes()).digest()) for file in files]
    installed = {(each.name or "").lower(): each.version for each in metadata.distributions()}
    versions = [installed.get(name) for name in _PACKAGES]
    return hashlib.sha256(repr((contents, versions, parts)).encode()).hexdigest()[:32]
