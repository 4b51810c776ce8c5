"""A consumer of an iterator in a thread of its own, fed by the thread that makes the items."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_END, _CUT = object(), object()
_TURN = 0.1  # seconds after which a full queue asks whether its consumer has failed


class Cut(Exception):
    """What the consumer's iterator raises where the items end early."""


@contextlib.contextmanager
def feeding(consume: Callable[[Iterator[T]], object], waiting: int = 2) -> Iterator[Callable[[T], None]]:
    """Calls `consume(items)` in a thread, whose items are what the block gives to its function.

    At most `waiting` items wait for the consumer; then the function does. At its end the block waits for the consumer
    and raises its error; items given after an error are dropped. Where the block raises, the consumer's iterator raises
    `Cut` after the items that it was given.
    """
    given: queue.Queue[Any] = queue.Queue(waiting)

    def items() -> Iterator[T]:
        while (item := given.get()) is not _END:
            if item is _CUT:
                raise Cut
            yield item

    def put(item: Any) -> None:
        while not done.done():
            with contextlib.suppress(queue.Full):
                return given.put(item, timeout=_TURN)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(consume, items())
        try:
            yield put
        except BaseException:
            put(_CUT)
            raise
        put(_END)
        done.result()
