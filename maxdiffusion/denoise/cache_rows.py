"""The state of a step cache by video, in a form that no mesh, batch or mode of guidance decides."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class CacheRows:
    """How the calls of a step hold the states of their videos.

    An array of one call is (turns x) videos x branches x windows of a turn x ..., the first three in one axis, with
    numbers of a row (the log) in that axis, too. By video it is videos x branches x windows x numbers x ...

    Attributes:
      videos: of the batch.
      calls: of the network in a step.
      branches: of guidance in a call.
      turns: the windows of each turn (`Windows.turns`); None: there are no windows.
      tokens: of a call, without padding.
    """

    videos: int
    calls: int
    branches: int
    turns: tuple[tuple[int, ...], ...] | None
    tokens: int

    def by_video(self, states: Sequence[Any], fetch: Callable[[Any], np.ndarray] = np.asarray) -> list[np.ndarray]:
        """The arrays of the states of all calls; `fetch` brings one to the host."""
        leaves = zip(*map(jax.tree.leaves, states), strict=True)
        return [self._by_video(np.stack([fetch(leaf) for leaf in each])) for each in leaves]

    def by_call(self, arrays: Sequence[np.ndarray], abstract: Sequence[Any]) -> tuple[Any, ...]:
        """The inverse, of arrays `by_video`; `abstract` are the states of this step's calls."""
        leaves = [self._by_call(a, like) for a, like in zip(arrays, jax.tree.leaves(abstract[0]), strict=True)]
        structure = jax.tree.structure(abstract[0])
        return tuple(jax.tree.unflatten(structure, [leaf[call] for leaf in leaves]) for call in range(self.calls))

    def shapes(self, abstract: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        """Shape and dtype of each array of one video."""
        return [jax.ShapeDtypeStruct(self._shape(leaf), leaf.dtype) for leaf in jax.tree.leaves(abstract[0])]

    @property
    def _turns(self) -> tuple[tuple[int, ...], ...]:
        return ((0,),) if self.turns is None else self.turns

    @property
    def _lead(self) -> tuple[int, int, int, int, int]:
        """Calls, turns, videos, branches and windows, as the arrays of all calls have them."""
        return self.calls, len(self._turns), self.videos, self.branches, len(self._turns[0])

    def _rest(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes of a call's array after its rows."""
        return tuple(shape[1 if self.turns is None else 2 :])

    def _shape(self, leaf: Any) -> tuple[int, ...]:
        calls, turns, videos, branches, windows = self._lead
        rest = self._rest(leaf.shape)
        numbers = leaf.size // int(np.prod((turns, videos, branches, windows, *rest)))
        rest = (self.tokens, *rest[1:]) if len(rest) == 2 else rest
        return 1, calls * branches, 1 + max(itertools.chain(*self._turns)), numbers, *rest

    def _by_video(self, a: np.ndarray) -> np.ndarray:
        calls, turns, videos, branches, windows = self._lead
        a = a.reshape(*self._lead, -1, *self._rest(a.shape[1:]))
        a = np.moveaxis(a, (2, 0, 3, 1, 4), range(5))
        a = a.reshape(videos, calls * branches, turns * windows, *a.shape[5:])
        a = a[:, :, : 1 + max(itertools.chain(*self._turns))]  # what fills the last turn is computed twice
        return a[..., : self.tokens, :] if a.ndim == 6 else a

    def _by_call(self, a: np.ndarray, like: Any) -> np.ndarray:
        calls, turns, videos, branches, windows = self._lead
        a = a[:, :, list(itertools.chain(*self._turns))]
        a = a.reshape(videos, calls, branches, turns, windows, *a.shape[3:])
        a = np.moveaxis(a, range(5), (2, 0, 3, 1, 4))
        if a.ndim == 8:  # tokens
            padding = self._rest(like.shape)[0] - self.tokens
            a = np.pad(a, [(0, 0)] * 6 + [(0, padding), (0, 0)])
        return a.reshape(calls, *like.shape)
