"""Tensors under the names of the diffusers layout, whatever names the file has, and fp8 and int8 with their scales.

Reads no number, so that each net keeps one name table (weights/tables) and one strict match.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from maxdiffusion.errors import UserError
from maxdiffusion.weights import comfy_quant
from maxdiffusion.weights.sources import TensorSource, row_slice, scaled
from maxdiffusion.weights.tables.original import Table

# What files put before all names: ComfyUI, trainers, torch's DistributedDataParallel.
_PREFIX = re.compile(r"((model|diffusion_model|module)\.)*")
FP8 = ("F8_E4M3", "F8_E5M2")
INT8 = "I8"  # never without a scale

# Tensors beside `X.weight`: its scale, in either spelling, those for quantised activations, which are not used, and
# ComfyUI's note. Some converters write scales for layers left in bf16 as well. `scaled_fp8` marks the older spelling.
_SCALES = ("scale_weight", "weight_scale")
_UNUSED = ("scale_input", "input_scale", comfy_quant.TENSOR)
_MARK = "scaled_fp8"


def normalised(tensors: Mapping[str, TensorSource], table: Table) -> dict[str, TensorSource]:
    """A file's tensors by their diffusers names, fp8 and int8 scaled and fused ones split; `name` stays the stored one.

    A name that is not in the table is kept; `mapping.match` accepts or refuses it.

    Raises:
      UserError: a scaled file with an fp8 weight that has no scale or one in blocks; the same of any int8 weight, or
        one in a format of ComfyUI that cannot be read; two names of one tensor.
    """
    result: dict[str, TensorSource] = {}
    for name, tensor in renamed(_with_scales(bare(tensors)), table):
        if name in result:
            raise UserError(
                f"{tensor.file} stores {tensor.name!r} and {result[name].name!r}, which are two names of one tensor; "
                "use a checkpoint that stores it once."
            )
        result[name] = tensor
    return result


def bare(tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The tensors by their names without `model.`, `diffusion_model.` and `module.` before them."""
    return {_PREFIX.sub("", name, count=1): tensor for name, tensor in tensors.items()}


def is_original(tensors: Mapping[str, TensorSource]) -> bool:
    """Whether any tensor of `normalised` is stored under its name in the official repositories."""
    return any(not tensor.name.endswith(name) for name, tensor in tensors.items())


def renamed(tensors: Mapping[str, TensorSource], table: Table) -> Iterator[tuple[str, TensorSource]]:
    """(diffusers name, tensor) of each; the rows of a tensor of several modules are split evenly."""
    rows = [(_pattern(module), (ours,) if isinstance(ours, str) else ours) for module, ours in table.items()]
    for name, tensor in tensors.items():
        for pattern, targets in rows:
            if hit := pattern.fullmatch(name):
                names = [target.format(**hit.groupdict()) + (hit.groups()[-1] or "") for target in targets]
                yield from zip(names, _split(tensor, len(names)), strict=True)
                break
        else:
            yield name, tensor


def _pattern(module: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(module)) + r"(\.[a-z]+)?")


def _split(tensor: TensorSource, parts: int) -> list[TensorSource]:
    """Equal parts of its rows; where they do not divide, `mapping.match` refuses the shape."""
    if parts == 1:
        return [tensor]
    count = tensor.shape[0] // parts if tensor.shape else 0
    return [row_slice(tensor, part * count, count) for part in range(parts)]


def _with_scales(tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The tensors, each in fp8, in int8 or with a scale as `scaled`, without the scales."""
    result = dict(tensors)
    unscaled, notes = [], []
    has_scales = result.pop(_MARK, None) is not None
    for name, tensor in tensors.items():
        if name not in result:
            continue
        module = name.removesuffix("weight")
        scale = next((tensors[module + key] for key in _SCALES if result.pop(module + key, None)), None)
        if scale is None and tensor.dtype not in (*FP8, INT8):
            continue
        for key in _UNUSED:
            beside = result.pop(module + key, None)
            if beside and key == comfy_quant.TENSOR and tensor.dtype == INT8:
                notes.append(beside)
        if scale is None:
            unscaled.append(name)
        else:
            has_scales = True
            _check_scale(tensor, scale)
        result[name] = scaled(tensor, scale)
    lacking = [tensors[name] for name in unscaled if name in result and (has_scales or tensors[name].dtype == INT8)]
    if lacking:
        raise UserError(
            f"{lacking[0].file} stores {len(lacking)} tensors in {lacking[0].dtype} without their scales, such as "
            f"{lacking[0].name!r}; use a whole file, or one in bf16 or fp16."
        )
    comfy_quant.check_tensors(notes)
    return result


def _check_scale(tensor: TensorSource, scale: TensorSource) -> None:
    rows = tensor.shape[0] if tensor.shape else 1
    if scale.dtype not in ("F32", "BF16", "F16") or not (
        math.prod(scale.shape) == 1 or scale.shape in ((rows,), (rows, 1))
    ):
        raise UserError(
            f"{tensor.file} scales {tensor.name!r} by {scale.dtype}{list(scale.shape)}; one number for the tensor or "
            "for each row can be read, not blocks: use another file, in bf16 or fp16 say."
        )


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ in their first number only, written once: `blocks.{0-39}.norm.weight`."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        groups.setdefault((*parts[:at], "", *parts[at + 1 :]), []).extend(int(part) for part in parts[at : at + 1])
    return [".".join(part or _ranges(sorted(numbers)) for part in key).rstrip(".") for key, numbers in groups.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text: [3] is `3`, [0, 1, 2, 5] is `{0-2,5}`."""
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{{{text}}}" if len(numbers) > 1 else text
