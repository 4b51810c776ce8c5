"""Latents on disk: one safetensors file with the float32 tensor `latents`, b c f h w (inside: b f h w c)."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from maxdiffusion.errors import UserError
from maxdiffusion.runtime.atomic import atomic_path
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.weights.headers import read_header

KEY = "latents"


def save_latents(
    path: AnyPath, latents: Float[np.ndarray, "b f h w c"], metadata: Mapping[str, str], overwrite: bool = False
) -> None:
    """Writes the latents, normalised as the solver returns them; `path` is either whole or absent.

    Raises:
      UserError: `path` exists, its folder cannot be written to, or the disk is full; nothing is left behind.
    """
    data = np.ascontiguousarray(np.asarray(latents, np.float32).transpose(0, 4, 1, 2, 3))
    # A prompt of bytes that are not UTF-8 has lone surrogates, which the format cannot hold.
    texts = {key: text.encode("utf-8", "backslashreplace").decode() for key, text in metadata.items()}
    # The safetensors library writes metadata in random order; equal latents give equal bytes here.
    tensor = {"dtype": "F32", "shape": data.shape, "data_offsets": (0, data.nbytes)}
    header = json.dumps({"__metadata__": texts, KEY: tensor}, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # the data begins at a multiple of 8 bytes
    with atomic_path(path, overwrite) as temporary:
        temporary.write_bytes(struct.pack("<Q", len(header)) + header + data.tobytes())


def load_latents(path: AnyPath, shape: tuple[int, ...] | None = None) -> tuple[np.ndarray, dict[str, str]]:
    """The latents (float32, b f h w c) and the metadata strings of a file that `save_latents` or anyone else wrote.

    Args:
      path: the file.
      shape: the b f h w c that is needed, if it is known.

    Raises:
      UserError: absent, truncated or not safetensors; no tensor `latents`, or one of another dtype, rank or shape;
        values that are NaN or infinite.
    """
    tensors, metadata = read_header(path)
    if KEY not in tensors:
        others = sorted(tensors)
        shown = f"{', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}"
        raise UserError(
            f"{path} has no tensor {KEY!r} (only: {shown}); give a .latents.safetensors of a run, or rename it."
        )
    tensor = tensors[KEY]
    if tensor.dtype != "F32":
        raise UserError(f"{path} stores {KEY!r} as {tensor.dtype}; save it as F32.")
    if len(tensor.shape) != 5 or 0 in tensor.shape:
        raise UserError(
            f"{path} stores {KEY!r} with the shape {list(tensor.shape)}; "
            "its axes must be b c f h w, none of them empty."
        )
    wanted = shape and tuple(shape[axis] for axis in (0, 4, 1, 2, 3))
    if wanted and tensor.shape != wanted:
        raise UserError(
            f"{path} stores {KEY!r} with the shape {list(tensor.shape)} (b c f h w) and this run needs {list(wanted)}; "
            "change height, width, num_frames or the batch to match it."
        )
    latents = np.ascontiguousarray(tensor.rows(0, tensor.shape[0]).transpose(0, 2, 3, 4, 1))
    if undefined := latents.size - np.count_nonzero(np.isfinite(latents)):
        raise UserError(
            f"{path} holds {undefined} NaN or infinite values of {latents.size}; give latents of a run that did not "
            "overflow."
        )
    return latents, metadata
