"""What was compiled before, kept beside the compiled programs. Imports no jax."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import maxdiffusion
from maxdiffusion.config import schema
from maxdiffusion.errors import UserError
from maxdiffusion.request import Job
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.atomic import atomic_path

T = TypeVar("T")

_ROOT = Path(maxdiffusion.__file__).parent
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "tokamax", "numpy")
# What sets the compiler's options, and what reads compiled programs.
_READERS = (
    _ROOT / "parallel" / "compiler.py",
    *(_ROOT / "planning" / name for name in ("schedule.py", "predict.py", "kernels.py", "worker.py")),
    *(_ROOT / "hardware" / name for name in ("links.py", "chips.py")),
)


class Cache:
    """Files of JSON by the digest of what they follow from; in no folder, nothing is kept."""

    def __init__(self, jax_cache_dir: str):
        """Beside that folder.

        Raises:
          UserError: it cannot be reached.
        """
        on = jax_cache_dir not in ("", "none")
        self._folder = paths.probe(os.path.expanduser(jax_cache_dir)).parent / "plans" if on else None

    def read(self, name: str, parse: Callable[[bytes], T]) -> T | None:
        """What was kept under that name; None where nothing is, or what cannot be parsed."""
        if self._folder is None:
            return None
        try:
            return parse((self._folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, name: str, content: bytes) -> str:
        """Keeps it, whole or not at all; says why where that fails, else nothing."""
        if self._folder is None:
            return ""
        try:
            with atomic_path(self._folder / f"{name}.json", overwrite=True) as path:
                path.write_bytes(content)
        except (OSError, UserError) as error:
            return str(error)
        return ""


def digest(*parts: Any) -> str:
    """Of anything whose repr says all."""
    return hashlib.sha256(json.dumps([repr(part) for part in parts]).encode()).hexdigest()[:32]


def asked(job: Job, configs: Any, devices: object) -> str:
    """The digest of all that a plan of `job` follows from."""
    keys = {key: value for key, value in job.cfg.to_json().items() if schema.KEYS[key].of_the_program}
    videos = [video.shape for video in job.videos]
    prompts = {prompt for video in job.videos for prompt in (video.prompt, video.negative_prompt)}
    files = sorted(_ROOT.rglob("*.py"))
    follows = (keys, sorted(videos), len(prompts), configs, devices)
    return digest("plan", follows, _versions(), *map(_content, files))


def program(name: str, text: str, devices: str) -> str:
    """The digest of a program, what it is compiled for and with, and what reads the result."""
    return digest("program", name, text, devices, _versions(), *map(_content, _READERS))


def _content(file: Path) -> tuple[str, bytes]:
    return str(file.relative_to(_ROOT)), hashlib.sha256(file.read_bytes()).digest()


def _versions() -> list[tuple[str, str]]:
    installed = {(each.name or "").lower(): each.version for each in metadata.distributions()}
    return [(name, installed[name]) for name in _PACKAGES if name in installed]
