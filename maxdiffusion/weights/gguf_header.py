"""The header of a GGUF file: its metadata and where its tensors are, which are stored in blocks of quantised numbers.

`gguf.GGUFReader` maps a whole local file to memory; this reads the header alone, from any store. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the names of the files for ComfyUI: city96/ComfyUI-GGUF.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import IO, Any

from maxdiffusion.errors import UserError
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.weights.sources import BYTES, TensorSource, quantised, stored

MAGIC = b"GGUF"
ARCHITECTURES = ("wan", "t5encoder", "t5", "umt5")  # of files for ComfyUI, of llama.cpp
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # metadata: the shape of a tensor that is stored with another one
_AGAIN = "download or copy it again"

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the values of a header; raises EOFError where the file is too short for one."""

    file: IO[bytes]
    size: int

    def bytes(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size else b""
        if len(data) != count:
            raise EOFError
        return data

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind}", self.bytes(count * struct.calcsize(f"<{kind}")))

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        of, count = self.number("I"), self.number("Q")
        return self.numbers(_NUMBERS[of], count) if of in _NUMBERS else [self.value(of) for _ in range(count)]


def read(file: IO[bytes], path: AnyPath, size: int) -> tuple[dict[str, TensorSource], dict[str, str]]:
    """The tensors of a GGUF file, with their axes in torch's order, and its metadata strings.

    Args:
      file: `path`, opened, behind the four bytes of the magic.
      path: for the tensors and the messages.
      size: of the file in bytes.

    Raises:
      UserError: the file is cut off or damaged, of another version or byte order, one part of several, of the
        architecture of another model, or quantised in a way that `gguf` cannot read.
    """
    read, end = _Reader(file, size), len(MAGIC)
    try:
        _check_version(path, read.number("I"))
        tensor_count, value_count = read.numbers("Q", 2)
        metadata = {read.string(): read.value(read.number("I")) for _ in range(value_count)}
        _check_model(path, metadata)
        infos = [
            (read.string(), read.numbers("Q", read.number("I"))[::-1], read.number("I"), read.number("Q"))
            for _ in range(tensor_count)
        ]
        alignment = metadata.get("general.alignment", 32)
        base = end = _aligned(file.tell(), alignment)
        tensors: dict[str, TensorSource] = {}
        for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
            tensor = _tensor(name, shape, metadata.get(ORIGINAL_SHAPE + name, shape), kind, path, base + offset)
            if name in tensors:
                raise ValueError(f"{name} is stored twice")
            if tensor.start != _aligned(end, alignment):
                raise ValueError(f"{name} does not begin where the tensor before it ends")
            tensors[name], end = tensor, tensor.start + tensor.nbytes
    except EOFError:
        raise UserError(f"{path} ({size} bytes) is a GGUF file that is cut off within its header; {_AGAIN}.") from None
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path} has a damaged GGUF header ({error!r}); {_AGAIN}.") from None
    if not end <= size <= _aligned(end, alignment):
        what = "truncated" if size < end else "followed by unknown bytes"
        raise UserError(f"{path} is {what}: it has {size} bytes and its header asks for {end}; {_AGAIN}.")
    return tensors, {key: value for key, value in metadata.items() if isinstance(value, str)}


def _check_version(path: AnyPath, version: int) -> None:
    if version in (2, 3):
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    what = f"of version {version}" if version <= swapped else "in big-endian order"
    raise UserError(f"{path} is a GGUF file {what}; little-endian ones of version 2 or 3 can be read.")


def _check_model(path: AnyPath, metadata: dict[str, Any]) -> None:
    """Checks what the metadata say of the model; files of stable-diffusion.cpp say nothing."""
    count = metadata.get("split.count", 1)
    if count > 1:
        raise UserError(
            f"{path} is part {metadata.get('split.no', 0) + 1} of {count} of one GGUF file; join them with "
            "`llama-gguf-split --merge FIRST_PART WHOLE_FILE`."
        )
    architecture = metadata.get("general.architecture", ARCHITECTURES[0])
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path} is a GGUF file of the architecture {architecture!r}; those of WAN ({ARCHITECTURES[0]}) and its "
            f"text encoder ({ARCHITECTURES[1]}) can be read."
        )


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _tensor(
    name: str, stored_shape: tuple[int, ...], shape: tuple[int, ...], number: int, path: AnyPath, start: int
) -> TensorSource:
    """A tensor of `shape` whose numbers are stored as `stored_shape`."""
    import gguf
    import numpy as np

    if math.prod(shape) != math.prod(stored_shape) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{name}: shape {stored_shape} and original shape {shape}")
    try:
        kind = gguf.GGMLQuantizationType(number)
        if kind.name in BYTES:
            return stored(name, kind.name, tuple(shape), path, start)
        block = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros(block[1], np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise UserError(
            f"{path} stores {name!r} in the quantisation {number}, which the package gguf cannot read; use a file in "
            "Q8_0, Q6_K, Q5_K, Q4_K or their like."
        ) from None
    if not stored_shape or stored_shape[-1] % block[0]:
        raise ValueError(f"{name}: rows of shape {stored_shape} are no whole blocks of {block[0]} numbers")
    return quantised(name, kind.name, block, tuple(shape), path, start)
