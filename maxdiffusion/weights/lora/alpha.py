"""The scale of an update, alpha / rank, from all places in which trainers declare alpha."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maxdiffusion.errors import UserError
from maxdiffusion.weights.lora.names import bare

_NUMBERS = ("lora_alpha", "network_alpha", "alpha", "ss_network_alpha")  # strings of a file's metadata
_UNDECLARED = ("none", "dynamic")  # of kohya's scripts: the tensors of the modules say it


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What a file declares for all its modules, beside their own alpha tensors.

    Attributes:
      source: where, for messages.
      alpha: of every module that `alphas` does not name; None where only the tensors say it.
      rank: the same with `ranks`.
      alphas: by PEFT's patterns of module names.
      ranks: the same.
      patterned: whether ranks may differ (PEFT); else one alpha cannot serve modules of several ranks.
      rank_stabilized: whether the scale is alpha / sqrt(rank).
      decomposed: whether every module has a magnitude (DoRA).
    """

    source: str
    alpha: float | None
    rank: float | None = None
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ranks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    patterned: bool = False
    rank_stabilized: bool = False
    decomposed: bool = False

    def of(self, module: str) -> tuple[float | None, float | None]:
        """Alpha and rank of a module, by its name in the file."""
        return _matched(self.alphas, module, self.alpha), _matched(self.ranks, module, self.rank)


def declarations(metadata: Mapping[str, str], adapter_config: Mapping[str, Any] | None) -> Iterator[Declaration]:
    """The declarations of a file's metadata strings and of the adapter_config.json beside it.

    Raises:
      UserError: one cannot be read.
    """
    if text := metadata.get("lora_adapter_metadata"):
        try:
            content = {re.sub(r"^transformer(_2)?\.", "", key): value for key, value in json.loads(text).items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"lora_adapter_metadata in its header is not a JSON object ({error})") from None
        yield _of_peft("lora_adapter_metadata in its header", content)
    if adapter_config is not None:
        yield _of_peft("adapter_config.json beside it", adapter_config)
    for key in _NUMBERS:
        if key in metadata and metadata[key].lower() not in _UNDECLARED:
            yield Declaration(f"{key} in its header", _number(metadata[key], f"{key} in its header"))


def _of_peft(source: str, content: Mapping[str, Any]) -> Declaration:
    alpha = next((content[key] for key in ("lora_alpha", "alpha") if content.get(key) is not None), None)

    def numbers(key: str) -> dict[str, float]:
        pattern = content.get(key) or {}
        if not isinstance(pattern, dict):
            raise UserError(f"{key} of {source} is {pattern!r}, which is not an object")
        return {name: _number(value, f"{key} of {source}") for name, value in pattern.items()}

    return Declaration(
        source,
        None if alpha is None else _number(alpha, f"alpha of {source}"),
        None if content.get("r") is None else _number(content["r"], f"r of {source}"),
        numbers("alpha_pattern"),
        numbers("rank_pattern"),
        patterned=True,
        rank_stabilized=bool(content.get("use_rslora")),
        decomposed=bool(content.get("use_dora")),
    )


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number <= 0:
        raise UserError(f"{what} is {value!r}, which is not a positive number")
    return number


def _matched(patterns: Mapping[str, float], module: str, otherwise: float | None) -> float | None:
    """PEFT: the first pattern that matches the end of the name, from one of its points on."""
    for pattern, value in patterns.items():
        try:
            hit = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error:
            continue
        if hit:
            return value
    return otherwise


def alphas(
    ranks: Mapping[str, int], own: Mapping[str, float], declared: Sequence[Declaration]
) -> dict[str, float | None]:
    """Alpha of each module, by its name in the file; None where nothing declares it.

    Args:
      ranks: of the modules with factors.
      own: their alpha tensors.
      declared: for all modules.

    Raises:
      UserError: two declarations differ, or one number is declared for modules of several ranks.
    """
    result: dict[str, float | None] = {}
    # Alphas of a file's own modules may differ from each other; then no one number in the header describes them.
    uniform = len({*own.values()}) == 1
    mixed = len({*ranks.values()}) > 1
    for module, rank in ranks.items():
        said = {"its alpha tensor": own[module]} if module in own else {}
        for each in declared:
            alpha, declared_rank = each.of(bare(module))
            if declared_rank not in (None, rank):
                raise UserError(f"{module} has rank {rank}, but {each.source} declares {declared_rank:g}")
            if alpha is None or (module in own and not uniform and not each.patterned):
                continue
            if mixed and not each.patterned and module not in own:
                numbers = " and ".join(map(str, sorted({*ranks.values()})[:3]))
                raise UserError(f"{each.source} is one alpha, {alpha:g}, for modules of ranks {numbers}")
            said[each.source] = alpha
        if len({*said.values()}) > 1:
            shown = ", ".join(f"{alpha:g} by {source}" for source, alpha in said.items())
            raise UserError(f"alpha of {module} is {shown}")
        result[module] = next(iter(said.values()), None)
    return result
