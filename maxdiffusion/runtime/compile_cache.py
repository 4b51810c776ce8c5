"""The compile cache: compiled programs on disk or in a bucket, for later runs."""

import os
from pathlib import Path

import jax

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths

_BY_JAX = ("gs", "s3", "az")  # what etils.epath, which comes with flax, reads for jax by fsspec's file systems


def enable(jax_cache_dir: str | None) -> None:
    """Keep every compiled program in `jax_cache_dir` (a folder, `~` allowed, or gs://); "", "none" or None: keep none.

    jax's key of an entry: the program, jaxlib, the compiler's flags, the kind and number of devices. Call it before the
    first compilation. Runs may share a folder: a damaged entry, as a killed run may leave it, is compiled and written
    again, with jax's warning.

    Raises:
      UserError: the folder cannot be made or written.
    """
    if not jax_cache_dir or jax_cache_dir == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = paths.parse(os.path.expanduser(jax_cache_dir))
    if isinstance(folder, Path):
        _writable(folder)
    elif folder.protocol not in _BY_JAX:
        places = f"{', '.join(_BY_JAX)}:// or a local folder"
        raise UserError(f"jax_cache_dir={jax_cache_dir} cannot be read or written by jax; give {places}.")
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths.check_writable(folder)
    except OSError as error:
        raise UserError(
            f'jax_cache_dir={folder} cannot be written ({error.strerror}); choose another folder or "" for no cache'
        ) from error
