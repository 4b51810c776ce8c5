"""Text embeddings on disk, beside the compile cache, for later runs with the same encoder and prompt."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

import maxdiffusion
from maxdiffusion.errors import UserError
from maxdiffusion.request.session import Session
from maxdiffusion.runtime import distributed, paths
from maxdiffusion.runtime.atomic import atomic_path
from maxdiffusion.runtime.paths import AnyPath

log = logging.getLogger(__name__)

LIMIT = 2**30  # bytes of a local folder; 600 prompts of 100 tokens. Those that were used longest ago go first


class TextCache:
    """Files `text/<digest>.npy` beside `jax_cache_dir`; without such a folder, nothing is kept.

    The digest is of the encoder's weights, the tokenizer, dtypes, device kind, this package's version and the prompt.
    """

    def __init__(self, s: Session):
        cfg = s.job.cfg
        self._folder: AnyPath | None = None
        if cfg.jax_cache_dir in ("", "none"):
            return
        self._folder = paths.parse(os.path.expanduser(cfg.jax_cache_dir)).parent / "text"
        digests = s.nets.checkpoint.digests
        self._key = (
            *(digests[name] for name in ("text_encoder", "tokenizer")),
            *(str(dtype) for dtype in (cfg.text_encoder_dtype, cfg.weights_dtype, cfg.activations_dtype)),
            s.setup.device_kind,
            maxdiffusion.__version__,
        )

    def read(self, prompts: Sequence[str]) -> dict[str, Float[np.ndarray, "k e"]]:
        """The embeddings that are there, equal on all processes; a file that cannot be read counts as absent."""
        if self._folder is None:
            return {}
        found: dict[str, np.ndarray] = {}
        if distributed.index() == 0:
            for prompt in prompts:
                try:
                    path = self._path(self._folder, prompt)
                    found[prompt] = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
                except (OSError, ValueError, EOFError):
                    continue
                if isinstance(path, Path):
                    os.utime(path)
        if distributed.count() == 1:
            return found
        shapes = distributed.on_process_0(lambda: {prompt: list(array.shape) for prompt, array in found.items()})
        from jax.experimental import multihost_utils

        arrays = [found.get(prompt, np.zeros(shape, np.float32)) for prompt, shape in shapes.items()]
        sent = multihost_utils.broadcast_one_to_all(arrays)
        return dict(zip(shapes, map(np.asarray, sent), strict=True))

    def write(self, prompt: str, embedding: Float[np.ndarray, "k e"]) -> None:
        """Keep an embedding, unless it is not finite; a folder that cannot be written is one line in the log."""
        if self._folder is None or distributed.index() or not np.isfinite(embedding).all():
            return
        data = io.BytesIO()
        np.save(data, embedding)
        try:
            with atomic_path(self._path(self._folder, prompt), overwrite=True) as path:
                path.write_bytes(data.getvalue())
            if isinstance(self._folder, Path):
                _trim(self._folder)
        except (UserError, OSError) as error:
            log.info("the text embedding is not kept for later runs: %s", error)
            self._folder = None

    def _path(self, folder: AnyPath, prompt: str) -> AnyPath:
        text = repr((*self._key, prompt)).encode()
        return folder / f"{hashlib.sha256(text).hexdigest()[:32]}.npy"


def _trim(folder: Path) -> None:
    files = sorted(((file.stat(), file) for file in folder.glob("*.npy")), key=lambda each: each[0].st_mtime)
    excess = sum(about.st_size for about, _ in files) - LIMIT
    for about, file in files:
        if excess <= 0:
            return
        file.unlink(missing_ok=True)
        excess -= about.st_size
