"""The states of a step cache by video are the same, however a step's calls held them."""

import collections
import itertools

import jax
import numpy as np
import pytest

from maxdiffusion.denoise.cache_rows import CacheRows

VIDEOS, BRANCHES, TOKENS, LOG = 2, 2, 5, 3
State = collections.namedtuple("State", "log count tokens latents")


def held(layout, windows, padded):
    """The states as the calls of that layout hold them: each number tells video, branch, window and place."""
    turns = layout.turns or ((0,),)

    def array(call, *shape, flat=False):
        def one(video, branch, window):
            start = 1000 * (1 + video + VIDEOS * (branch + BRANCHES * window))
            return start + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

        branches = range(call * layout.branches, (call + 1) * layout.branches)
        rows = [[one(*row) for row in itertools.product(range(VIDEOS), branches, turn)] for turn in turns]
        rows = np.array(rows).reshape(len(turns), *((-1,) if flat else (len(rows[0]), *shape)))
        return rows[0] if layout.turns is None else rows

    def tokens(call):
        padding = [(0, 0), (0, padded - TOKENS), (0, 0)]
        return np.pad(array(call, TOKENS, 4), padding if layout.turns is None else [(0, 0), *padding])

    return tuple(
        State(array(call, LOG, flat=True), array(call, flat=True), tokens(call), array(call, 2, 2, 2, 1))
        for call in range(layout.calls)
    )


LAYOUTS = {
    "two passes": (CacheRows(VIDEOS, 2, 1, None, TOKENS), 1, 8),
    "batched": (CacheRows(VIDEOS, 1, 2, None, TOKENS), 1, 5),
    "windows in turn": (CacheRows(VIDEOS, 2, 1, ((0,), (1,), (2,)), TOKENS), 3, 6),
    "windows two at a time": (CacheRows(VIDEOS, 1, 2, ((0, 1), (2, 2)), TOKENS), 3, 8),
}


@pytest.mark.parametrize(("one", "other"), [("two passes", "batched"), ("windows in turn", "windows two at a time")])
def test_a_layout_takes_what_another_one_kept(one, other):
    for first, second in ((one, other), (other, one)):
        (before, windows, padded), (after, _, padded_after) = LAYOUTS[first], LAYOUTS[second]
        kept = before.by_video(held(before, windows, padded))
        want = held(after, windows, padded_after)
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), want)
        assert [(1, *a.shape[1:]) for a in kept] == [leaf.shape for leaf in after.shapes(abstract)]
        jax.tree.map(np.testing.assert_array_equal, after.by_call(kept, abstract), want)
