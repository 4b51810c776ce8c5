"""One line of a name table: torch name -> parameter path and the permutation of axes; the lines of common layers."""

from __future__ import annotations

import dataclasses
import enum


class Transform(enum.Enum):
    """The permutation from torch's axes to the parameter's."""

    KEEP = None
    LINEAR = (1, 0)  # (out, in) -> (in, out)
    CONV1D = (2, 1, 0)  # (out, in, t) -> (t, in, out)
    CONV2D = (2, 3, 1, 0)  # (out, in, h, w) -> (h, w, in, out)
    CONV3D = (2, 3, 4, 1, 0)  # (out, in, t, h, w) -> (t, h, w, in, out)


@dataclasses.dataclass(frozen=True)
class Rule:
    """`source` is the torch name, `target` the dotted path of the parameter.

    `{layer}` in `source` alone: the tensor is one slot of the stacked parameter `target` (leading axis). Any other
    placeholder, such as `{i}`, stands for an integer and appears in both. `reshape` drops the singleton axes that torch
    keeps on a vector, such as (c, 1, 1, 1): the tensor is reshaped to the parameter's own shape after the permutation;
    the number of elements must agree. `aliases` are further names under which the same tensor may be stored: one of
    the names is enough, and where a file has several they must be identical.
    """

    source: str
    target: str
    transform: Transform = Transform.KEEP
    reshape: bool = False
    aliases: tuple[str, ...] = ()


Rules = tuple[Rule, ...]


def weight_bias(source: str, target: str, transform: Transform = Transform.LINEAR, reshape: bool = False) -> Rules:
    """Kernel and bias of a linear layer or a convolution; `reshape` holds for the kernel."""
    return (
        Rule(f"{source}.weight", f"{target}.kernel", transform, reshape=reshape),
        Rule(f"{source}.bias", f"{target}.bias"),
    )


def norm(source: str, target: str) -> Rules:
    """Scale and bias of a layer norm."""
    return Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")
