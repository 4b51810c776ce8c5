"""Matches a checkpoint's tensors with parameters, strictly both ways, before a weight is read."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from maxdiffusion.errors import UserError
from maxdiffusion.weights import quantize
from maxdiffusion.weights.naming import grouped
from maxdiffusion.weights.rule import Rule
from maxdiffusion.weights.sources import FLOATS, TensorSource

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One tensor and its target: a whole parameter, or slot `layer` of a stacked one.

    `shape` is the shape of the parameter or slot; `copies` are the same tensor under its other names.
    """

    tensor: TensorSource
    rule: Rule
    shape: tuple[int, ...]
    layer: int | None
    copies: tuple[TensorSource, ...] = ()


_KERNEL, _SCALE = "kernel", "_scale"  # a quantised kernel's own name, and what its scale's adds to it
_SHOWN = 6  # names, or groups of them, in each list of a message

Assignments = Mapping[str, Sequence[Assignment]]  # by the parameter's path, in the order of layers


def parameters(module: nnx.Module) -> dict[str, nnx.Variable[Any]]:
    """Every variable of `module`, abstract or loaded, by its dotted path."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module))}


def match(
    tensors: Mapping[str, TensorSource],
    rules: Sequence[Rule],
    module: nnx.Module,
    *,
    what: str,
    ignored: Sequence[str] = (),
) -> Assignments:
    """Finds the tensors that fill every parameter of `module`.

    Args:
      tensors: of the checkpoint, by name.
      rules: the network's name table.
      module: the abstract network; it gives the shapes and the number of stacked layers. A quantised kernel is filled
        from the tensor of the kernel, and so is its scale.
      what: the checkpoint's folder, for the message.
      ignored: regular expressions of the names that the network knowingly does not use.

    Raises:
      UserError: counting and naming tensors without a parameter, parameters without a tensor, wrong shapes and dtypes.
      ValueError: the table itself is wrong: two of its rules fill one slot or read one name.
    """
    every = parameters(module)
    params = {name: param for name, param in every.items() if not name.endswith(f".{_KERNEL}{_SCALE}")}
    found: dict[str, list[Assignment]] = {target: [] for target in params}
    wrong: dict[str, list[str]] = defaultdict(list)
    missing: list[str] = []
    used: set[str] = set()
    ruled: set[str] = set()

    for target, layer, names, rule in _slots(params, rules):
        shape = params[target].shape if layer is None else params[target].shape[1:]
        present = [tensors[name] for name in names if name in tensors]
        if any(name in used for name in names) or layer in (assignment.layer for assignment in found[target]):
            raise ValueError(f"two rules read {names} or fill {target}")
        used.update(names)
        ruled.add(target)
        if not present:
            missing.append(names[0])
            continue
        for tensor in present:
            if not _fits(tensor, shape, rule):
                wrong[f"{_dims(tensor.shape)} instead of {_dims(_in_torch(shape, rule))}"].append(tensor.name)
            elif tensor.dtype not in FLOATS:
                wrong[f"{tensor.dtype} instead of {', '.join(FLOATS)}"].append(tensor.name)
        found[target].append(Assignment(present[0], rule, shape, layer, tuple(present[1:])))

    unused = [name for name in tensors if name not in used]
    skipped = [name for name in unused if any(re.fullmatch(skip, name) for skip in ignored)]
    if skipped:
        log.info("%s: the model does not use %s", what, ", ".join(grouped(skipped)))
    surplus = [name for name in unused if name not in skipped]
    problems = [
        _listed("missing from the checkpoint", missing),
        _listed("not a part of the model", surplus),
        _listed("parameters that no tensor is known for", [target for target in params if target not in ruled]),
        *[_listed(f"stored as {why}", names) for why, names in wrong.items()][:_SHOWN],
        f"{len(wrong) - _SHOWN} further shapes" if len(wrong) > _SHOWN else "",
    ]
    if any(problems):
        raise UserError(
            f"The weights in {what} do not fit the model that its config.json describes: "
            f"{'; '.join(filter(None, problems))}; use the config.json and the weights of one supported checkpoint."
        )
    return _quantized(found, every)


def _quantized(found: Mapping[str, list[Assignment]], params: Mapping[str, nnx.Variable[Any]]) -> Assignments:
    """The assignments, of quantised kernels computed from their tensors, and those of their scales."""
    result: dict[str, list[Assignment]] = dict(found)
    for target in [target for target in found if target + _SCALE in params]:
        kernels, scales = [], []
        for each in found[target]:
            dtype = params[target].dtype.name
            (values, scale), *copies = (quantize.by_row(tensor, dtype) for tensor in (each.tensor, *each.copies))
            kernels.append(dataclasses.replace(each, tensor=values, copies=tuple(copy for copy, _ in copies)))
            rule = Rule(each.rule.source, target + _SCALE)
            scales.append(Assignment(scale, rule, params[target + _SCALE].shape[-1:], each.layer))
        result |= {target: kernels, target + _SCALE: scales}
    return result


def _slots(
    params: Mapping[str, nnx.Variable[Any]], rules: Sequence[Rule]
) -> Iterator[tuple[str, int | None, tuple[str, ...], Rule]]:
    """(parameter, layer, torch names, rule) of each parameter or slot that a rule names."""
    for rule in rules:
        names = (rule.source, *rule.aliases)
        pattern = re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(rule.target)))
        for target, param in params.items():
            if hit := pattern.fullmatch(target):
                layers: Sequence[int | None] = range(param.shape[0]) if "{layer}" in rule.source else (None,)
                for layer in layers:
                    yield target, layer, tuple(name.format(**hit.groupdict(), layer=layer) for name in names), rule


def _fits(tensor: TensorSource, shape: Sequence[int], rule: Rule) -> bool:
    if rule.reshape:
        return math.prod(tensor.shape) == math.prod(shape)
    return tensor.shape == _in_torch(shape, rule)


def _in_torch(shape: Sequence[int], rule: Rule) -> tuple[int, ...]:
    """The shape with its axes in torch's order."""
    order = rule.transform.value
    if rule.reshape or order is None or len(order) != len(shape):
        return tuple(shape)
    return tuple(shape[order.index(axis)] for axis in range(len(shape)))


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _listed(what: str, names: Sequence[str]) -> str:
    """How many names and the first of them, grouped."""
    if not names:
        return ""
    groups = grouped(names)
    return f"{len(names)} {what}: {', '.join([*groups[:_SHOWN], *(['...'] if groups[_SHOWN:] else [])])}"
