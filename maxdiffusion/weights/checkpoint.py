"""A checkpoint folder in the diffusers layout, opened from its JSON and its safetensors headers alone.

Nothing here reads a weight or imports jax or numpy, so that a damaged download is named within milliseconds. The format
of a file: eight bytes hold the little-endian length of a JSON header, which gives each tensor's dtype, shape and byte
range in what follows (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import struct
from collections.abc import Mapping
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.weights.sources import BYTES, Stored

INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_STEMS = ("diffusion_pytorch_model", "model")  # diffusers, transformers
_HEADER_LIMIT = 100_000_000  # the safetensors library's own limit
_AGAIN = "download or copy it again"


def read_json(path: AnyPath) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      UserError: the file is absent, unreadable or not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the checkpoint is incomplete: {_AGAIN}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from None
    except (ValueError, RecursionError) as error:  # covers bad UTF-8 as well
        raise UserError(f"{path} is not valid JSON ({error}); {_AGAIN}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}, not an object; {_AGAIN}.")
    return content


def read_header(path: AnyPath) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of one safetensors file and its metadata strings.

    Raises:
      UserError: the file is absent, not safetensors (a git-lfs pointer, say), has a damaged header or an unknown dtype,
        or its size is not the one that the header asks for.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            if prefix == b"version ":
                raise UserError(f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder.")
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            text = file.read(length) if length <= min(_HEADER_LIMIT, size) else b""
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the checkpoint is incomplete: {_AGAIN}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from None
    if not text.startswith(b"{"):
        raise UserError(
            f"{path} ({size} bytes) is no safetensors file, or is cut off within its header; {_AGAIN}, or convert it."
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
        raise UserError(f"{path} is {what}: it has {size} bytes and its header asks for {end}; {_AGAIN}.")
    return tensors, metadata


def _tensor(name: str, entry: dict[str, Any], path: AnyPath, base: int) -> Stored:
    if entry["dtype"] not in BYTES:
        raise UserError(
            f"{path} stores {name!r} as {entry['dtype']}, an unknown dtype; use a checkpoint in F32, BF16 or F16."
        )
    shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, first, last)):
        raise ValueError(f"{name}: shape {shape} and offsets {first}, {last} must be natural numbers")
    tensor = Stored(name, entry["dtype"], shape, path, base + first)
    if last - first != tensor.nbytes:
        raise ValueError(f"{name}: bytes {first} to {last} do not hold {tensor.dtype}{list(tensor.shape)}")
    return tensor


def read_tensors(path: AnyPath) -> dict[str, Stored]:
    """Every tensor of one net: of a safetensors file, of an index and its shards, or of the folder that holds either.

    Raises:
      UserError: no such file, both kinds at once, a listed shard absent, index and shards that disagree, a torch
        pickle, or whatever `read_header` finds.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a torch pickle, which is a program that reading it would run; use safetensors, such as those "
            "of the official checkpoint in the diffusers layout (Wan-AI/Wan2.1-T2V-14B-Diffusers and its like)."
        )
    return _read_shards(path) if path.name.endswith(INDEX) else read_header(path)[0]


def _read_folder(folder: AnyPath) -> dict[str, Stored]:
    found = [path for end in (".safetensors", INDEX) for stem in _STEMS if (path := folder / (stem + end)).exists()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{folder} holds {names}, so it is unclear which are the weights; keep one of them.")
    if found:
        return read_tensors(found[0])
    there = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", *PICKLES))
    raise UserError(
        f"{folder} holds no {_STEMS[0]}.safetensors, no {_STEMS[1]}.safetensors and no index of shards"
        + (f" (it has {', '.join(there[:4])}{', ...' if len(there) > 4 else ''})" if there else "")
        + "; use a checkpoint saved in the diffusers layout as safetensors."
    )


def _read_shards(index: AnyPath) -> dict[str, Stored]:
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


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the parsed config.json and the stored tensors of each net.

    `paths` (where the weights lie), `configs` and `tensors` are keyed by the net's folder name, such as "transformer".
    """

    folder: AnyPath
    paths: Mapping[str, AnyPath]
    configs: Mapping[str, dict[str, Any]]
    tensors: Mapping[str, Mapping[str, Stored]]

    def digest(self) -> str:
        """SHA-256 of the configs and the headers: equal for copies of one checkpoint in different places."""
        headers = {
            net: sorted((t.name, t.dtype, t.shape, t.file.name, t.start) for t in tensors.values())
            for net, tensors in self.tensors.items()
        }
        return hashlib.sha256(json.dumps([self.configs, headers], sort_keys=True).encode()).hexdigest()


def open_checkpoint(
    folder: AnyPath,
    nets: Mapping[str, str | tuple[str, ...]],
    files: Mapping[str, AnyPath] | None = None,
    *,
    pipeline: str = "WanPipeline",
    extra: tuple[str, ...] = ("tokenizer", "scheduler"),
) -> Checkpoint:
    """Opens a local checkpoint folder.

    Args:
      folder: the folder that holds model_index.json.
      nets: folder name -> the class name that its config.json must carry, such as {"vae": "AutoencoderKLWan"}, or
        several of which any will do.
      files: folder name -> what is read in place of the weights in that folder (see `read_tensors`); a config.json
        that the folder does not have is then empty.
      pipeline: the `_class_name` that model_index.json must carry.
      extra: further folders that must exist.

    Raises:
      UserError: anything absent, damaged or of another class.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a checkpoint folder in the diffusers layout or a hub id.")
    if not (folder / "model_index.json").exists():
        raise UserError(
            official_layout(folder)
            or f"{folder} has no model_index.json, so it is no checkpoint in the diffusers layout; "
            f"give the folder that holds model_index.json, {', '.join([*nets, *extra])}."
        )
    _expect(folder / "model_index.json", read_json(folder / "model_index.json"), "_class_name", pipeline)
    files = files or {}
    for name in (*nets, *extra):
        if name not in files and not (folder / name).is_dir():
            raise UserError(f"{folder} has no folder {name!r}; the checkpoint is incomplete: download it again.")
    tokenizer = folder / "tokenizer"
    unread = (tokenizer / "spiece.model").exists() and not (tokenizer / "tokenizer.json").exists()
    if unread and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{tokenizer} has spiece.model and no tokenizer.json, and the package that reads the former is not "
            "installed; put the tokenizer.json of google/umt5-xxl beside it, or pip install sentencepiece."
        )
    configs: dict[str, dict[str, Any]] = {}
    for name, class_name in nets.items():
        path = folder / name / "config.json"
        if name in files and not path.exists():
            configs[name] = {}
            continue
        configs[name] = read_json(path)
        key = "_class_name" if "_class_name" in configs[name] else "architectures"  # diffusers, transformers
        _expect(path, configs[name], key, class_name)
    paths = {name: files.get(name, folder / name) for name in nets}
    return Checkpoint(folder, paths, configs, {name: read_tensors(path) for name, path in paths.items()})


def official_layout(folder: AnyPath) -> str | None:
    """Why a folder of an official repository cannot be the whole checkpoint; None for any other folder."""
    pickles = sorted(path.name for path in folder.glob("*.pth"))
    if not pickles or (folder / "model_index.json").exists():
        return None
    nets = [name for name in ("high_noise_model", "low_noise_model") if (folder / name).is_dir()]
    return (
        f"{folder} is in an official repository's own layout, with torch pickles ({', '.join(pickles)}), which are not "
        "read; give the official checkpoint in the diffusers layout (a hub id that ends in -Diffusers) and, if you "
        f"wish, the transformer from here as transformer_file={folder / nets[0] if nets else folder}."
    )


def _expect(path: AnyPath, content: dict[str, Any], key: str, wanted: str | tuple[str, ...]) -> None:
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    got = content.get(key)
    if got not in (*wanted, *([one] for one in wanted)):
        raise UserError(
            f"{path} says {key}: {got!r}, and this command runs {wanted[0]}; use a checkpoint of that kind."
        )
