"""The schedule of a compiled program, read from its text. Imports no jax.

The text of a scheduled module is in order of issue. The TPU's compiler notes its estimate of cycles at fusions, copies
and the like, but none at loops, collectives and Pallas kernels: their shapes, groups and counts are noted here instead.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

Array = tuple[str, tuple[int, ...]]  # dtype and shape


@dataclasses.dataclass(frozen=True)
class Work:
    """A fusion, copy, ... with its estimate of cycles; `linear` if it has matrix products or convolutions."""

    name: str
    linear: bool
    cycles: int


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy without an estimate of cycles, and the bytes that it writes."""

    name: str
    size: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call of a Pallas kernel, with the kernel's name."""

    name: str
    operands: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of a group of devices.

    Attributes:
      kind: all-to-all, all-gather, all-reduce, reduce-scatter or collective-permute.
      size: bytes of what one device gives, or of the whole that it gets (all-gather) or gives (reduce-scatter).
      group: the numbers, in the order of the mesh, of the devices of the first group or, in a permutation, cycle.
      key: name shared by its start and its end; empty if it is synchronous.
    """

    kind: str
    size: int
    group: tuple[int, ...]
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Done:
    """The end of the collective that was started with this key."""

    key: str


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop and how often it runs."""

    times: int
    body: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several branches."""

    branches: tuple[tuple[Step, ...], ...]


Step = Work | Copy | Kernel | Collective | Done | Loop | Choice


def steps(hlo: str) -> tuple[Step, ...]:
    """The steps of one device in order of issue, from `jax.stages.Compiled.as_text()` for TPUs.

    Raises:
      ValueError: the module is not scheduled, or it has a loop without a constant bound.
    """
    if "is_scheduled=true" not in hlo.split("\n", 1)[0]:
        raise ValueError("the module is not scheduled, so that its order has no meaning")
    computations: dict[str, list[_Instruction]] = {"": []}
    entry = name = ""
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            name, computations[header[2]] = header[2], []
            entry = name if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            computations[name].append(_Instruction(*found.groups()))
    return tuple(_steps(computations, entry))


# ---- the text


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def called(self) -> dict[str, str]:
        """Attribute -> the computation that it names."""
        return dict(re.findall(r"\b(\w+)=%([\w.\-]+)", self.rest))

    @property
    def operand(self) -> str:
        """The name of the first one."""
        return re.findall(r"%([\w.\-]+)", self.rest)[0]


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
_COLLECTIVE = re.compile(r"(all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(-start|-done)?")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+)\[([\d,]*)\]")
_COPIES = ("concatenate", "copy", "pad", "reshape", "slice", "transpose")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

_Computations = Mapping[str, list[_Instruction]]


def _steps(computations: _Computations, name: str) -> Iterator[Step]:
    for each in computations[name]:
        called = each.called
        cycles = _CYCLES.search(each.rest)
        if each.opcode == "while":
            yield Loop(_times(computations, called["condition"]), tuple(_steps(computations, called["body"])))
        elif each.opcode == "conditional":
            named = re.search(r"branch_computations=\{.*?\}|true_computation=.*?false_computation=[^,]+", each.rest)
            branches = re.findall(r"%([\w.\-]+)", named[0] if named else "")
            yield Choice(tuple(tuple(_steps(computations, branch)) for branch in branches))
        elif each.opcode == "call":
            yield from _steps(computations, called["to_apply"])
        elif 'custom_call_target="tpu_custom_call"' in each.rest:
            layouts = re.search(r"operand_layout_constraints=\{(.*?[}\]])\}", each.rest)
            yield Kernel(re.sub(r"\.\d+$", "", each.name), tuple(_arrays(layouts[1] if layouts else "")))
        elif collective := _collective(computations, each):
            yield collective
        elif cycles and not each.opcode.endswith(("-start", "-done")):
            inner = (each, *_within(computations, called.get("calls", "")))
            yield Work(each.name, any(one.opcode in ("convolution", "dot") for one in inner), int(cycles[1]))
        elif each.opcode in _COPIES:
            yield Copy(each.name, sum(map(_bytes, _arrays(each.shape))))


def _within(computations: _Computations, name: str) -> Iterator[_Instruction]:
    for each in computations.get(name, ()):
        yield each
        yield from _within(computations, each.called.get("calls", ""))


def _times(computations: _Computations, condition: str) -> int:
    """The bound of a counter that starts at 0: the largest integer that the condition names."""
    bounds = [
        int(each.rest.split(")")[0])
        for each in _within(computations, condition)
        if each.opcode == "constant" and re.match(r"[su]\d+\[\]", each.shape)
    ]
    if not bounds:
        raise ValueError(f"the loop with the condition {condition} has no constant bound")
    return max(bounds)


def _collective(computations: _Computations, each: _Instruction) -> Collective | Done | None:
    """The collective, or the end of one, that an instruction is: synchronous, with a start, or in an `async-start`."""
    inner = each
    if each.opcode in ("async-start", "async-done"):
        wrapped = each.called.get("calls", "")
        inner = next((one for one in computations.get(wrapped, ()) if _COLLECTIVE.fullmatch(one.opcode)), each)
        if each.opcode == "async-done" and _COLLECTIVE.match(each.name.replace("_", "-")):
            return Done(each.operand)
    found = _COLLECTIVE.fullmatch(inner.opcode)
    if not found:
        return None
    if found[2] == "-done":
        return Done(each.operand)
    started = each.opcode.endswith("-start")
    # A start gives operands and results, and counters of the device's own.
    arrays = [_bytes(array) for array in _arrays(inner.shape) if array[1]]
    size = sum(arrays) // (2 if found[2] else 1)
    if found[2] and found[1] in ("all-gather", "reduce-scatter"):
        size = max(arrays)
    group = _group(inner.rest)
    if found[1] == "reduce-scatter" and not found[2]:
        size *= len(group)
    return Collective(found[1], size, group, each.name if started else "")


def _group(attributes: str) -> tuple[int, ...]:
    """The first group: listed, as a range of numbers, or as axes of a mesh; of a permutation, the first cycle."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        way = {int(a): int(b) for a, b in re.findall(r"(\d+),(\d+)", pairs[1])}
        cycle = [next(iter(way))]
        while (following := way.get(cycle[-1], cycle[0])) != cycle[0]:
            cycle.append(following)
        return tuple(cycle)
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    if ranges := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, sides, order = ([int(n) for n in part.split(",")] if part else [] for part in ranges.groups())
        return tuple(np.arange(math.prod(sides)).reshape(sides).transpose(order or None).reshape(shape)[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        lengths = {axis: int(length) for axis, length in re.findall(r"('[^']+')=(\d+)", mesh[1])}
        axes = re.findall(r"'[^']+'", mesh[2])
        numbers = np.arange(math.prod(lengths.values())).reshape(list(lengths.values()))
        others = tuple(number for number, axis in enumerate(lengths) if axis not in axes)
        return tuple(numbers.min(axis=others).ravel().tolist())
    return (0,)


def _arrays(text: str) -> Iterator[Array]:
    for dtype, sides in _ARRAY.findall(text):
        yield dtype, tuple(int(side) for side in sides.split(",") if side)


def _bytes(array: Array) -> int:
    dtype, sides = array
    bits = {"pred": 8, "bf16": 16}.get(dtype) or int(re.sub(r"\D.*", "", dtype.lstrip("suf")))
    return math.prod(sides) * max(bits, 8) // 8
