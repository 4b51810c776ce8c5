"""ComfyUI's notes on quantised layers: JSON in a tensor beside each weight, or for all layers in the file's header.

Format: github.com/comfyanonymous/ComfyUI, QUANTIZATION.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.weights.sources import TensorSource

HEADER = "_quantization_metadata"  # the key of the header
TENSOR = "comfy_quant"  # the last part of the tensor's name
_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")


def check_header(file: AnyPath, text: str) -> None:
    """Checks the notes of all layers.

    Raises:
      UserError: a layer is quantised in a way that cannot be read; the text is not such notes.
    """
    try:
        layers = json.loads(text).get("layers", {}).items()
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} has damaged {HEADER} ({error!r}); download or copy it again.") from None
    for layer, note in layers:
        _check(file, layer, note)


def check_tensors(notes: Sequence[TensorSource]) -> None:
    """Reads and checks the notes beside the weights of one file.

    Raises:
      UserError: a layer is quantised in a way that cannot be read; a tensor is not such a note.
    """
    for tensor, text in zip(notes, paths.each(notes[0].file, _text, notes) if notes else (), strict=True):
        try:
            note = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{tensor.file} has a damaged {tensor.name} ({error!r}); download or copy it again."
            ) from None
        _check(tensor.file, tensor.name.removesuffix(f".{TENSOR}"), note)


def _text(tensor: TensorSource) -> bytes:
    try:
        return paths.read(tensor.file, tensor.start, tensor.start + tensor.nbytes)
    except OSError as error:
        raise UserError(f"{tensor.file} cannot be read ({error.strerror}); check the disk and load again.") from None


def _check(file: AnyPath, layer: str, note: Any) -> None:
    what = note.get("format") if isinstance(note, dict) else note
    if isinstance(note, dict) and note.get("convrot"):  # the weights are multiplied by a Hadamard matrix
        what = f"{what} with rotated weights (convrot)"
    if what not in _FORMATS:
        raise UserError(
            f"{file} stores {layer!r} as {what}; {', '.join(_FORMATS)} can be read: use one of these, or bf16 or fp16."
        )
