"""Which network's parameters denoise which steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np


class Segment(NamedTuple):
    """Steps start .. stop - 1, all denoised with `params`."""

    start: int
    stop: int
    params: Any


@runtime_checkable
class Experts(Protocol):
    """A frozen value; two experts split the run where the timesteps cross their boundary."""

    def segments(self, timesteps: np.ndarray) -> Sequence[Segment]:
        """The run, in order and without gaps; all params of one structure, shape and sharding."""


@dataclasses.dataclass(frozen=True)
class SingleExpert:
    """One network for all steps: every model but the A14B ones."""

    params: Any

    def segments(self, timesteps: np.ndarray) -> Sequence[Segment]:
        return (Segment(0, len(timesteps), self.params),)
