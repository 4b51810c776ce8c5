"""The headers of weight files, safetensors or GGUF: which tensors they hold, and where.

Nothing here reads a weight or imports jax or, for safetensors, numpy, so that a damaged download is named within
milliseconds. The format of a safetensors file: eight bytes hold the little-endian length of a JSON header, which gives
each tensor's dtype, shape and byte range in the data that follows (https://github.com/huggingface/safetensors,
"Format").
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.weights import comfy_quant, gguf_header
from maxdiffusion.weights.sources import BYTES, TensorSource, stored

INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PICKLED = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # the first bytes of what torch.save writes, and wrote before 1.6
_STEMS = ("diffusion_pytorch_model", "model")  # diffusers, transformers
_HEADER_LIMIT = 100_000_000  # the safetensors library's own limit
_AGAIN = "download or copy it again"


@contextlib.contextmanager
def readable(path: AnyPath) -> Iterator[None]:
    """A block that reads `path`.

    Raises:
      UserError: the file is absent, no file, or cannot be read.
    """
    paths.check_file(path, str(path))
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the checkpoint is incomplete: {_AGAIN}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from None


def read_json(path: AnyPath) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      UserError: the file is absent, unreadable or not a JSON object.
    """
    try:
        with readable(path):
            content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # covers bad UTF-8 as well
        raise UserError(f"{path} is not valid JSON ({error}); {_AGAIN}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, not an object; {_AGAIN}.")
    return content


def read_header(path: AnyPath) -> tuple[dict[str, TensorSource], dict[str, str]]:
    """The tensors of one safetensors or GGUF file, whatever its name ends with, and its metadata strings.

    Raises:
      UserError: the file is absent, of neither format (a git-lfs pointer, say), has a damaged header or an unknown
        dtype, or has another size than its header asks for.
    """
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        prefix = file.read(8)
        if prefix == b"version ":
            raise UserError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder.")
        if prefix.startswith(_PICKLED):
            raise UserError(_pickle(path))
        if prefix.startswith(gguf_header.MAGIC):
            file.seek(len(gguf_header.MAGIC))
            return gguf_header.read(file, path, size)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        text = file.read(length) if length <= min(_HEADER_LIMIT, size) else b""
    if not text.startswith(b"{"):
        raise UserError(
            f"{path} ({size} bytes) is neither a safetensors nor a GGUF file, or is cut off within its header; "
            f"{_AGAIN}, or convert it."
        )
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata  # as the safetensors library reads null
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds more than strings")
        tensors = {name: _tensor(name, entry, path, 8 + length) for name, entry in entries.items()}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
            if tensor.start != end:
                raise ValueError(f"{tensor.name} does not begin where the tensor before it ends")
            end += tensor.nbytes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a damaged safetensors header ({error!r}); {_AGAIN}.") from None
    if size != end:
        what = "truncated" if size < end else "followed by unknown bytes"
        linked = isinstance(path, Path) and path.is_symlink()  # into a hub's cache, which would serve it again
        again = f"delete {path.resolve()} and {_AGAIN}" if linked else _AGAIN
        raise UserError(f"{path} is {what}: it has {size} bytes and its header asks for {end}; {again}.")
    if comfy_quant.HEADER in metadata:
        comfy_quant.check_header(path, metadata[comfy_quant.HEADER])
    return tensors, metadata


def _tensor(name: str, entry: dict[str, Any], path: AnyPath, base: int) -> TensorSource:
    if entry["dtype"] not in BYTES:
        raise UserError(
            f"{path} stores {name!r} as {entry['dtype']}, an unknown dtype; use a checkpoint in F32, BF16 or F16."
        )
    shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
        raise ValueError(f"{name}: shape {shape} and offsets {first}, {last} must be natural numbers")
    tensor = stored(name, entry["dtype"], shape, path, base + first)
    if last - first != tensor.nbytes:
        raise ValueError(f"{name}: bytes {first} to {last} do not hold {tensor.dtype}{list(tensor.shape)}")
    return tensor


def read_tensors(path: AnyPath) -> dict[str, TensorSource]:
    """The tensors of one network: of a safetensors file, of an index and its shards, or of a folder with either.

    Raises:
      UserError: no such file, both kinds at once, a listed shard absent, index and shards that disagree, a torch
        pickle, or a fault that `read_header` names.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in PICKLES:
        raise UserError(_pickle(path))
    return _read_shards(path) if path.name.endswith(INDEX) else read_header(path)[0]


def _pickle(path: AnyPath) -> str:
    to = path.with_name(f"{path.stem}_converted.safetensors")
    return (
        f"{path} is a torch pickle, which can run any program when it is opened, so it is not; convert it once where "
        'torch is installed: python -c "import torch, safetensors.torch as s; '
        f"d = torch.load(open('{path}', 'rb'), map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.contiguous() for k, v in d.items()}}, '{to}')\""
    )


def _read_folder(folder: AnyPath) -> dict[str, TensorSource]:
    found = [path for end in (".safetensors", INDEX) for stem in _STEMS if (path := folder / (stem + end)).exists()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{folder} holds {names}, so it is unclear which are the weights; keep one of them.")
    if found:
        return read_tensors(found[0])
    there = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".gguf", *PICKLES))
    raise UserError(
        f"{folder} holds no {_STEMS[0]}.safetensors, no {_STEMS[1]}.safetensors and no index of shards"
        + (f" (it has {', '.join(there[:4])}{', ...' if len(there) > 4 else ''})" if there else "")
        + "; use a checkpoint saved in the diffusers layout as safetensors, or give a single file itself."
    )


def _read_shards(index: AnyPath) -> dict[str, TensorSource]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or {type(shard) for shard in weight_map.values()} != {str}:
        raise UserError(f"{index} has no `weight_map` from tensor names to files; {_AGAIN}.")
    shards = sorted({*weight_map.values()})
    missing = sorted({*shards} - {*paths.names(index.parent)})
    if missing:
        raise UserError(
            f"{index} lists {len(shards)} files, of which {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} absent; download the rest."
        )
    headers = {shard: read_header(index.parent / shard)[0] for shard in shards}
    listed = set(weight_map.items())
    stored = {(name, shard) for shard, tensors in headers.items() for name in tensors}
    if listed != stored:
        only = sorted(f"{name} ({shard})" for name, shard in listed ^ stored)
        raise UserError(
            f"{index} and its files disagree about {len(only)} tensors: {', '.join(only)}; "
            "download index and files again from one revision."
        )
    return {name: headers[shard][name] for name, shard in weight_map.items()}
