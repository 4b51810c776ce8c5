"""Names of the tensors of LoRA files, in all conventions in use, -> the module that they change and their part in it.

Points and underscores are not told apart in the name of a module: trainers write `blocks.0.self_attn.q`,
`blocks_0_self_attn_q` and `blocks_0.self_attn.q`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

from maxdiffusion.weights.tables import dit, original

_SLOT = r"(?:\.(?!(?:weight|bias)$)[^.]+)?"  # of PEFT: `.lora_A.default.weight`
_TENSOR = re.compile(
    r"(?P<module>.+?)(?:"
    r"[._]lora(?:_linear_layer)?\.(?P<old>up|down)(?:\.weight)?"
    rf"|\.lora_(?P<factor>A|B|up|down|mid){_SLOT}(?P<bias>\.bias)?(?:\.weight)?"
    rf"|\.(?P<magnitude>dora_scale|lora_magnitude_vector){_SLOT}(?:\.weight)?"
    r"|\.(?P<delta>diff|diff_b|diff_m|w_norm|b_norm)"
    rf"|\.(?P<product>(?:hada|lokr)_(?:w[12](?:_[ab])?|t[12])){_SLOT}"
    r"|\.(?P<alpha>alpha)"
    r")"
)
_FACTORS = {"A": "down", "down": "down", "B": "up", "up": "up", "mid": "mid"}
_DELTAS = {"diff": "diff", "w_norm": "diff", "diff_b": "diff_b", "b_norm": "diff_b", "diff_m": "diff"}
_MODULATION = (".modulation", "_modulation", "scale_shift_table")

_PREFIX = re.compile(
    r"(?:(?:peft_model|base_model|diffusion_model|model|transformer(?:_2)?|unet|lora_unet|lora_transformer|lycoris|pipe"
    r"|dit|vace(?=_+vace_))_+)+"
)
_VACE = re.compile(r"blocks_(\d+)_vace_(.+)")  # the adapter's blocks by the layer after which each acts


def split(name: str) -> tuple[str, str] | None:
    """(name of the module, part) of a tensor; None where it has no part of a LoRA.

    Parts: down, up, mid, up_bias (factors of an update); hada_*, lokr_* (those of LoHa and LoKr); magnitude (DoRA);
    alpha; diff and diff_b (the whole change of a weight and of a bias).
    """
    hit = _TENSOR.fullmatch(name)
    if hit is None:
        return None
    module = hit["module"]
    if factor := hit["old"] or hit["factor"]:
        part = _FACTORS[factor]
        return (module, f"{part}_bias") if hit["bias"] else (module, part)
    if hit["delta"] == "diff_m" and not module.endswith(_MODULATION):
        module += ".modulation"
    return module, hit["product"] or hit["alpha"] or _DELTAS.get(hit["delta"], "magnitude")


def modules(name: str, vace_layers: Sequence[int] = ()) -> tuple[str, ...]:
    """The diffusers names of a module: several for one whose rows are split, none for an unknown one.

    `vace_layers` are the layers after which the blocks of a VACE adapter act.
    """
    flat = _PREFIX.sub("", name.replace(".", "_"), count=1)
    if hit := _VACE.fullmatch(flat):
        if int(hit[1]) not in vace_layers:
            return ()
        flat = f"vace_blocks_{vace_layers.index(int(hit[1]))}_{hit[2]}"
    if flat in _table():
        return _table()[flat]
    number = re.search(r"_(\d+)(?=_|$)", flat)
    if number is None:
        return ()
    pattern = flat[: number.start(1)] + "{i}" + flat[number.end(1) :]
    return tuple(target.format(i=number[1]) for target in _table().get(pattern, ()))


def bare(name: str) -> str:
    """The name of a module as the file has it, without the trainer's prefix."""
    flat = name.replace(".", "_")
    hit = _PREFIX.match(flat)
    return name[hit.end() :] if hit else name


@functools.cache
def _table() -> Mapping[str, tuple[str, ...]]:
    """Name with underscores -> diffusers names, for the original names and those of diffusers itself."""
    ours = {re.sub(r"\{\w+\}", "{i}", re.sub(r"\.(weight|bias)$", "", rule.source)) for rule in dit.RULES}
    rows: dict[str, tuple[str, ...]] = {name: (name,) for name in ours}
    rows |= {theirs: (name,) if isinstance(name, str) else name for theirs, name in original.DIT.items()}
    return {name.replace(".", "_"): targets for name, targets in rows.items()}
