"""Tensors under the names of the diffusers layout, whatever names the file has, and fp8 weights with their scales.

Reads no number, so that each net keeps one name table (weights/tables) and one strict match.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from maxdiffusion.errors import UserError
from maxdiffusion.weights.sources import TensorSource, row_slice, scaled
from maxdiffusion.weights.tables.original import Table

PREFIX = "model.diffusion_model."  # that files for ComfyUI may put before the names of a transformer
FP8 = ("F8_E4M3", "F8_E5M2")

# Tensors beside `X.weight` in fp8: its scale, in either spelling, and those for fp8 activations, which are not used.
# Format: github.com/comfyanonymous/ComfyUI, QUANTIZATION.md; `scaled_fp8` marks files of the older spelling.
_SCALES = ("scale_weight", "weight_scale")
_UNUSED = ("scale_input", "input_scale", "comfy_quant")
_MARK = "scaled_fp8"


def normalised(tensors: Mapping[str, TensorSource], table: Table) -> dict[str, TensorSource]:
    """A file's tensors by their diffusers names, fp8 scaled and fused ones split; `name` stays the stored one.

    A name that is not in the table is kept; `mapping.match` accepts or refuses it.

    Raises:
      UserError: a scaled file with an fp8 weight that has no scale or one in blocks; two names of one tensor.
    """
    found = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    result: dict[str, TensorSource] = {}
    for name, tensor in _renamed(_with_scales(found), table):
        if name in result:
            raise UserError(
                f"{tensor.file} stores {tensor.name!r} and {result[name].name!r}, which are two names of one tensor; "
                "use a checkpoint that stores it once."
            )
        result[name] = tensor
    return result


def is_original(tensors: Mapping[str, TensorSource]) -> bool:
    """Whether any tensor of `normalised` is stored under its name in the official repositories."""
    return any(name != tensor.name.removeprefix(PREFIX) for name, tensor in tensors.items())


def _renamed(tensors: Mapping[str, TensorSource], table: Table) -> Iterator[tuple[str, TensorSource]]:
    """(new name, tensor) of each; the rows of a tensor of several modules are split evenly."""
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
    """The tensors, each in fp8 as `scaled`, without the scales."""
    result = dict(tensors)
    unscaled = []
    has_scales = result.pop(_MARK, None) is not None
    for name, tensor in tensors.items():
        if tensor.dtype not in FP8 or name not in result:
            continue
        module = name.removesuffix("weight")
        scale = next((tensors[module + key] for key in _SCALES if result.pop(module + key, None)), None)
        for key in _UNUSED:
            result.pop(module + key, None)
        if scale is None:
            unscaled.append(name)
        else:
            has_scales = True
            _check_scale(tensor, scale)
        result[name] = scaled(tensor, scale)
    if has_scales and (bare := [tensors[name] for name in unscaled if name in result]):
        raise UserError(
            f"{bare[0].file} is a scaled fp8 file, but {len(bare)} of its fp8 tensors have no scale, such as "
            f"{bare[0].name!r}; use a whole file, or one in bf16 or fp16."
        )
    return result


def _check_scale(tensor: TensorSource, scale: TensorSource) -> None:
    rows = tensor.shape[0] if tensor.shape else 1
    if scale.dtype not in ("F32", "BF16", "F16") or not (
        math.prod(scale.shape) == 1 or scale.shape in ((rows,), (rows, 1))
    ):
        raise UserError(
            f"{tensor.file} scales {tensor.name!r} by {scale.dtype}{list(scale.shape)}; one number for the tensor or "
            "for each row can be read, not blocks: use another fp8 file, or one in bf16 or fp16."
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
