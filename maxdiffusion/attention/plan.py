"""The frozen description of how attention runs, parsed once from the config."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """scheme x local kernel x degrees."""

    scheme: str = "local"
    kernel: str = "dot_product"
    ring: int = 1
    ulysses: int = 1
