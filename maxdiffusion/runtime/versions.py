"""Versions of the software and devices that made a result."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from maxdiffusion import __version__


def versions() -> dict[str, Any]:
    """JSON types: versions of the package, jax, jaxlib, flax, numpy and python; git commit; machine and devices.

    `commit` ends in "+changes" where tracked files differ from it, and is None outside a checkout.
    """
    devices = jax.devices()
    return {
        "maxdiffusion": __version__,
        "commit": commit(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "machine": f"{platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
    }


def commit(root: Path) -> str | None:
    """The git commit of the checkout `root`; None inside another project's, where an installed package may lie."""
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
