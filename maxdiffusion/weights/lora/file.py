"""A LoRA file, read and checked by itself: its modules by their diffusers names. Imports no jax."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.paths import AnyPath
from maxdiffusion.weights.headers import PICKLES, read_header, read_json
from maxdiffusion.weights.lora import alpha, deltas, names
from maxdiffusion.weights.lora.deltas import Matrix, Mismatch
from maxdiffusion.weights.naming import grouped
from maxdiffusion.weights.sources import FLOATS, TensorSource, strips

_KINDS = {"up": "LoRA", "down": "LoRA", "mid": "LoRA", "hada": "LoHa", "lokr": "LoKr", "diff": "a whole difference"}
ADAPTER_CONFIG = "adapter_config.json"  # that PEFT writes beside adapter_model.safetensors


@dataclasses.dataclass(frozen=True)
class Module:
    """What a file changes of one module.

    Attributes:
      name: in the file.
      targets: its diffusers names; several share its rows evenly.
      parts: the tensors, by `names.split`'s parts.
      update: of its weight, without scale; None where the file changes its bias alone.
      alpha: None where nothing declares it.
      scale: of `update` and of its bias: alpha / rank, or what the file declares.
    """

    name: str
    targets: tuple[str, ...]
    parts: Mapping[str, TensorSource]
    update: Matrix | None
    alpha: float | None
    scale: float


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A LoRA file.

    Attributes:
      name: its path, for messages.
      tensors: all of it.
      modules: those whose names are known.
      unknown: names of the tensors that belong to no module of a WAN transformer.
    """

    name: str
    tensors: Mapping[str, TensorSource] = dataclasses.field(repr=False)
    modules: tuple[Module, ...]
    unknown: tuple[str, ...]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of its tensors' names, dtypes, shapes and numbers; reads the whole file once.

        Raises:
          UserError: a number is NaN or infinite.
        """
        import numpy as np

        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(repr((name, tensor.dtype, tensor.shape)).encode())
            for _, rows in strips(tensor, 0, tensor.shape[0] if tensor.shape else 1):
                digest.update(np.ascontiguousarray(rows).tobytes())
                # NaN and infinity carry over to a sum.
                if tensor.dtype in FLOATS and not np.isfinite(rows.astype("float32").sum(dtype="float64")):
                    raise UserError(f"{self.name} holds NaN or infinity in {name!r}; it is damaged: use another file.")
        return digest.hexdigest()


def read(path: AnyPath, vace_layers: Sequence[int] = ()) -> LoRA:
    """Reads the header of a LoRA file, the adapter_config.json beside it, and its alphas.

    Args:
      path: a safetensors file.
      vace_layers: the layers after which the blocks of the model's VACE adapter act, if it has one.

    Raises:
      UserError: it cannot be read or is not a LoRA for a WAN transformer, a factor is missing, alpha is declared twice.
    """
    if path.suffix in PICKLES:
        raise UserError(f"{path} is a torch pickle, which is a program that reading it would run; use safetensors.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the .safetensors file in it.")
    tensors, metadata = read_header(path)
    parts: dict[str, dict[str, TensorSource]] = {}
    targets: dict[str, tuple[str, ...]] = {}
    owners: dict[str, str] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, part = names.split(name) or ("", "")
        if module not in targets:
            targets[module] = names.modules(module, vace_layers) if module else ()
        if not targets[module]:
            unknown.append(name)
            continue
        other = next((own for t in targets[module] if (own := owners.setdefault(t, module)) != module), module)
        if other != module or part in parts.get(module, {}):
            twice = f"{other!r} and {module!r}" if other != module else f"{name!r} and {parts[module][part].name!r}"
            raise UserError(
                f"{path} holds {twice}, which change one module ({targets[module][0]}) twice; give a file with one "
                "adapter."
            )
        parts.setdefault(module, {})[part] = tensor
    if not parts:
        raise UserError(_no_lora(path, tensors))
    for tensor in (tensor for each in parts.values() for part, tensor in each.items() if part != "alpha"):
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path} stores {tensor.name!r} as {tensor.dtype}; it must be one of {', '.join(FLOATS)}.")
        if not math.prod(tensor.shape):
            raise UserError(
                f"{path} stores {tensor.name!r} with shape {list(tensor.shape)}, which is empty (rank 0); "
                "use another file."
            )
    try:
        modules = _modules(parts, targets, metadata, _adapter_config(path, parts))
    except UserError as error:
        raise UserError(f"{path}: {error}; use another file.") from None
    return LoRA(str(path), tensors, modules, tuple(unknown))


def _no_lora(path: AnyPath, tensors: Mapping[str, TensorSource]) -> str:
    some = ", ".join(grouped(tensors)[:3]) or "none at all"
    if any(names.modules(name.removesuffix(".weight")) for name in tensors):
        return f"{path} holds whole weights ({some}, ...), not a LoRA; give it as transformer_file."
    return (
        f"{path} is not a LoRA for a WAN transformer: none of its {len(tensors)} tensors has a known name ({some}); "
        "give one that was made for this model."
    )


def _adapter_config(path: AnyPath, parts: Mapping[str, Mapping[str, TensorSource]]) -> Mapping[str, Any] | None:
    """The adapter_config.json beside a file with PEFT's names."""
    config = path.parent / ADAPTER_CONFIG
    stored = [tensor.name for each in parts.values() for tensor in each.values()]
    peft = any(".lora_A" in name or name.startswith("base_model.") for name in stored)
    return read_json(config) if peft and config.is_file() else None


def _modules(
    parts: Mapping[str, Mapping[str, TensorSource]],
    targets: Mapping[str, tuple[str, ...]],
    metadata: Mapping[str, str],
    adapter_config: Mapping[str, Any] | None,
) -> tuple[Module, ...]:
    """The modules with their scales.

    Raises:
      UserError: without the file's name.
    """
    updates = {name: _update(name, each) for name, each in parts.items()}
    declared = tuple(alpha.declarations(metadata, adapter_config))
    ranks = {name: update.rank for name, update in updates.items() if update and update.rank}
    for name, own in parts.items():
        # LyCORIS does not scale two whole factors; PEFT does, by the rank that it declares.
        said = [rank for each in declared if (rank := each.of(names.bare(name))[1]) is not None]
        if said and name not in ranks and "lokr_w1" in own:
            ranks[name] = int(said[0])
    found = alpha.alphas(ranks, {name: number for name, number in _own(parts).items() if name in ranks}, declared)
    for declaration in declared:
        if declaration.decomposed and (plain := [name for name in ranks if "magnitude" not in parts[name]]):
            raise UserError(f"{declaration.source} declares DoRA, but {plain[0]} has no magnitude")
    root = any(declaration.rank_stabilized for declaration in declared)
    scales = {
        name: 1.0 if number is None else number / (math.sqrt(ranks[name]) if root else ranks[name])
        for name, number in found.items()
    }
    return tuple(
        Module(name, targets[name], own, updates[name], found.get(name), scales.get(name, 1.0))
        for name, own in parts.items()
    )


def _update(name: str, parts: Mapping[str, TensorSource]) -> Matrix | None:
    kinds = {_KINDS[kind] for part in parts if (kind := part.partition("_")[0]) in _KINDS and part != "diff_b"}
    if len(kinds) > 1:
        raise UserError(f"{name} mixes {' and '.join(sorted(kinds))}")
    try:
        update = deltas.matrix(parts)
    except KeyError as missing:
        there = " and ".join(repr(tensor.name) for part, tensor in parts.items() if part != "alpha")
        raise UserError(f"{name} has {there}, but no {missing.args[0]}") from None
    except Mismatch as shapes:
        raise UserError(f"the factors of {name} have shapes {shapes}, which cannot be multiplied") from None
    if update is None and ("diff_b" not in parts or "magnitude" in parts):
        there = next(iter(parts.values())).name
        raise UserError(f"{there!r} has no weights beside it")
    return update


def _own(parts: Mapping[str, Mapping[str, TensorSource]]) -> dict[str, float]:
    """The alpha tensors: one number each, of any dtype."""
    tensors = {name: each["alpha"] for name, each in parts.items() if "alpha" in each}
    for tensor in tensors.values():
        if math.prod(tensor.shape) != 1:
            raise UserError(f"{tensor.name!r} has shape {list(tensor.shape)}, but alpha is one number")
    if not tensors:
        return {}
    file = next(iter(tensors.values())).file
    values = paths.each(file, lambda tensor: float(tensor.rows(0, 1).reshape(-1)[0]), tensors.values())
    result = dict(zip(tensors, values, strict=True))
    for name, value in result.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{tensors[name].name!r} is {value:g}, which is not a positive number")
    return result
