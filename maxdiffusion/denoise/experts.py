"""Which experts are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx


class LoadedExperts:
    """The experts in memory, by folder: with residency `in_turn` only the last that was asked for, else all."""

    def __init__(self, load: Callable[[str], nnx.Module], residency: str) -> None:
        self._load, self._one = load, residency == "in_turn"
        self._loaded: dict[str, nnx.Module] = {}

    def free(self) -> None:
        """Drops all of them."""
        self._loaded.clear()

    def __getitem__(self, net: str) -> nnx.Module:
        if net not in self._loaded:
            if self._one:
                self.free()  # before the next is read
            self._loaded[net] = self._load(net)
        return self._loaded[net]
