"""A LoRA merged into the tensors of a transformer while they stream: its modules matched strictly. Imports no jax."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from maxdiffusion.errors import UserError
from maxdiffusion.hardware.quantization import LARGEST
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.variants import VARIANTS
from maxdiffusion.weights.lora import deltas
from maxdiffusion.weights.lora.deltas import Matrix, Mismatch
from maxdiffusion.weights.lora.file import LoRA, Module
from maxdiffusion.weights.naming import grouped
from maxdiffusion.weights.sources import TensorSource, plus

_IMAGE = re.compile(r".*\.attn2\.(add_[kv]_proj|norm_added_[kq])|condition_embedder\.image_embedder\..*")
_SAMPLED = 16, 8  # tensors, and rows of each, of which `lost` is computed


@dataclasses.dataclass(frozen=True)
class Merge:
    """One LoRA of a network.

    Attributes:
      lora: the file.
      strength: the factor of its updates.
      skipped: its modules for image tokens, which the network has not.
      changes: (before, after) of each weight that it changes.
    """

    lora: LoRA
    strength: float
    skipped: int
    changes: tuple[tuple[TensorSource, TensorSource], ...] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        """What matched, in one line."""
        modules = self.lora.modules
        kinds = {
            "LoHa": sum("hada_w1_a" in each.parts for each in modules),
            "LoKr": sum(any(part.startswith("lokr") for part in each.parts) for each in modules),
            "DoRA": sum("magnitude" in each.parts for each in modules),
            "whole differences": sum("diff" in each.parts for each in modules),
            "biases": sum(bool({"diff_b", "up_bias"} & each.parts.keys()) for each in modules),
        }
        factored = [each for each in modules if each.update and each.update.rank]
        words = [
            f"{len(modules) - self.skipped} of {len(modules)} modules",
            _range("rank", (each.update.rank for each in factored if each.update and each.update.rank)),
            _range("alpha", (each.alpha for each in factored if each.alpha is not None)) or "no alpha",
            *(f"{count} {kind}" for kind, count in kinds.items() if count),
            f"strength {self.strength:g}",
        ]
        unused = f"; the other {self.skipped} are for image tokens, which this model has not" if self.skipped else ""
        return f"{self.lora.name}: {', '.join(filter(None, words))}{unused}"

    def lost(self, dtype: str) -> float:
        """The share of the update that rounding the weights to `dtype` removes, from a sample of rows.

        0 where the rounded weights differ by the update, 1 where they do not differ. It is the projection on the
        update, since each rounding alone is off by half a step either way. In 8 bits, with a scale for each row, it is
        that of matrices.
        """
        import ml_dtypes  # noqa: F401  registers bfloat16
        import numpy as np

        from maxdiffusion.weights.quantize import rounded

        along = whole = 0.0
        count, rows = _SAMPLED
        changes = [pair for pair in self.changes if dtype not in LARGEST or len(pair[0].shape) == 2]
        for before, after in changes[:: -(-len(changes) // count) or 1]:
            first = (before.shape[0] - rows) // 2 if before.shape[0] > rows else 0
            part = first, min(first + rows, before.shape[0])
            old, new = (each.rows(*part).astype("float32") for each in (before, after))
            if dtype in LARGEST:
                kept = rounded(after, *part, dtype) - rounded(before, *part, dtype)
            else:
                kept = new.astype(dtype).astype("float32") - old.astype(dtype).astype("float32")
            along += float(np.vdot(kept, new - old))
            whole += float(np.vdot(new - old, new - old))
        return 1 - along / whole if whole else 0.0


def _range(what: str, numbers: Iterator[float]) -> str:
    found = sorted({*numbers})
    if not found:
        return ""
    return f"{what} {found[0]:g}" + (f" to {found[-1]:g}" if len(found) > 1 else "")


def merge(
    tensors: Mapping[str, TensorSource], config: DiTConfig, lora: LoRA, strength: float
) -> tuple[dict[str, TensorSource], Merge]:
    """The tensors of a transformer with the updates of `lora`, computed in fp32 as they are read.

    Args:
      tensors: by their diffusers names.
      config: the transformer's.
      lora: from `file.read`.
      strength: the factor of its updates.

    Raises:
      UserError: a tensor of the file has no place in the transformer, or another shape; nothing of it is then used.
    """
    result = dict(tensors)
    faults: dict[str, list[str]] = defaultdict(list, {"of unknown names": list(lora.unknown)} if lora.unknown else {})
    skipped, changes = 0, []
    for module in lora.modules:
        if not all(_weight(target, tensors) in tensors for target in module.targets):
            if config.image_dim is None and all(map(_IMAGE.fullmatch, module.targets)):
                skipped += 1
            else:
                faults["for modules that it has not"] += module.targets
            continue
        try:
            for name, changed in _changed(module, result, strength):
                if not name.endswith(".bias"):
                    changes.append((result[name], changed))
                result[name] = changed
        except Mismatch as shapes:
            faults[f"of shape {shapes}"] += module.targets
    if faults or skipped == len(lora.modules):
        raise UserError(_refusal(lora, config, faults))
    return result, Merge(lora, strength, skipped, tuple(changes))


def _weight(target: str, tensors: Mapping[str, TensorSource]) -> str:
    """The tensor of a module, or a parameter of its own (`scale_shift_table`)."""
    return target if target in tensors else f"{target}.weight"


def _changed(
    module: Module, tensors: Mapping[str, TensorSource], strength: float
) -> Iterator[tuple[str, TensorSource]]:
    """(name, tensor) of each that a module's updates change.

    Raises:
      Mismatch: an update has another shape.
    """
    magnitude = module.parts.get("magnitude")
    for name, update in _split(module, [_weight(target, tensors) for target in module.targets], module.update):
        tensor = tensors[name]
        if magnitude is None:
            yield name, plus(tensor, deltas.scaled(update, strength * module.scale, tensor))
        elif len(module.targets) > 1:
            raise Mismatch("a magnitude (DoRA) for several modules at once")
        else:
            yield name, deltas.decomposed(tensor, deltas.scaled(update, module.scale, tensor), magnitude, strength)
    biases = {name: tensors.get(name) for name in (f"{target}.bias" for target in module.targets)}
    for part, scale in (("diff_b", strength), ("up_bias", strength * module.scale)):
        if part not in module.parts:
            continue
        for name, update in _split(module, list(biases), deltas.stored(module.parts[part])):
            bias = biases[name]
            if bias is None:
                raise Mismatch(f"{list(module.parts[part].shape)} for a bias, which it has not")
            biases[name] = plus(bias, deltas.scaled(update, scale, bias))
            yield name, biases[name]  # type: ignore[misc]


def _split(module: Module, names: Sequence[str], update: Matrix | None) -> Iterator[tuple[str, Matrix]]:
    """(name, update) with equal parts of the rows for each name."""
    if update is None:
        return
    if update.shape[0] % len(names):
        raise Mismatch(f"{update.shape[0]}x{update.shape[1]} for {len(names)} modules")
    rows = update.shape[0] // len(names)
    for i, name in enumerate(names):
        yield name, update if len(names) == 1 else deltas.row_slice(update, i * rows, rows)


# ---- refusals


def _refusal(lora: LoRA, config: DiTConfig, faults: Mapping[str, Sequence[str]]) -> str:
    patch = next((each.update for each in lora.modules if each.targets == ("patch_embedding",)), None)
    wider = {reason: names for reason, names in faults.items() if list(names) == ["patch_embedding"]}
    taps = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    if patch and len(wider) == len(faults) == 1 and patch.shape[1] > config.in_channels * taps:
        return (
            f"{lora.name} is a control LoRA: it gives patch_embedding {patch.shape[1] // taps} input channels in place "
            f"of {config.in_channels}, the others being those of a control video, which cannot be given here; use "
            "model_name: wan2.1-vace for control videos."
        )
    if not faults:
        return (
            f"{lora.name} has only modules for image tokens ({len(lora.modules)}), which this model has not; give "
            "it to a model with an image encoder."
        )
    listed = "; ".join(f"{len(names)} {reason}: {', '.join(grouped(names)[:4])}" for reason, names in faults.items())
    like = _looks_like(lora)
    return (
        f"{lora.name} does not fit this transformer ({config.num_layers} layers of width {config.dim}): {listed}"
        + (f"; it looks like a LoRA for {like}" if like else "")
        + "; give one that was made for this model."
    )


def _looks_like(lora: LoRA) -> str:
    """The variants of the widths and modules that a file has."""
    shapes = {target: each.update.shape for each in lora.modules for target in each.targets if each.update}
    blocks = {name.partition(".attn1.")[0]: shape for name, shape in shapes.items() if ".attn1.to_" in name}
    widths = {shape for shape in blocks.values()}
    count = max((int(hit[1]) + 1 for name in shapes if (hit := re.match(r"blocks\.(\d+)\.", name))), default=0)
    if len(widths) != 1:
        return ""
    (width, _) = widths.pop()
    image = any(map(_IMAGE.fullmatch, shapes))
    vace = any(name.startswith("vace_") for name in shapes)
    found = [
        name
        for name, spec in VARIANTS.items()
        if spec.network
        and spec.dims
        and spec.dims.num_attention_heads * spec.dims.attention_head_dim == width
        and spec.dims.num_layers >= count
        and image == ("image_dim" in spec.network)
        and vace == ("vace_layers" in spec.network)
    ]
    return " or ".join(found) or f"a model of width {width} with {count} or more layers"
