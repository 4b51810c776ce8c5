"""What a result was made with."""

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
        "commit": _commit(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "machine": f"{platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
    }


def _commit(root: Path) -> str | None:
    """None where `root` is not itself the top of a checkout: an installed package may lie inside somebody else's."""
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        changes = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(changes, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
