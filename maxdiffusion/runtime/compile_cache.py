"""Compiled programs kept between runs."""

import os
import tempfile
from pathlib import Path

import jax

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths

_BY_JAX = ("gs", "s3", "az")  # what etils.epath, which comes with flax, reads for jax by fsspec's file systems


def enable(jax_cache_dir: str | None) -> None:
    """Keep every compiled program in `jax_cache_dir` (a folder, `~` allowed, or gs://); "", "none" or None: keep none.

    The key of an entry is jax's own: the program, jaxlib, the compiler's flags, the kind and number of devices. Call it
    before the first compilation. Runs may share a folder: an entry that is half-written, also one left so by a killed
    run, is compiled anew with jax's warning (jax does not replace it: delete the folder to be rid of that).

    Raises UserError where the folder cannot be made or written.
    """
    if not jax_cache_dir or jax_cache_dir == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = paths.parse(os.path.expanduser(jax_cache_dir))
    if isinstance(folder, Path):
        _writable(folder)
    elif folder.protocol not in _BY_JAX:
        raise UserError(
            f"jax_cache_dir={jax_cache_dir} is where jax cannot keep programs; give {', '.join(_BY_JAX)}:// or a local "
            "folder."
        )
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f'jax_cache_dir={folder} cannot be written ({error.strerror}); choose another folder or "" for no cache'
        ) from error
