"""A consumer in a thread: what it gets, and what becomes of failures on either side."""

import threading

import pytest

from maxdiffusion.runtime.feed import Cut, feeding


def test_the_consumer_has_all_items_in_order_once_the_block_has_ended():
    got = []
    with feeding(lambda items: got.extend(items)) as put:
        for number in range(100):
            put(number)
    assert got == list(range(100))


def test_it_works_beside_the_block_and_is_at_most_so_far_behind():
    """The consumer holds an item and two wait, so that the fourth cannot be given before it goes on."""
    begun, go, given = threading.Event(), threading.Event(), []

    def consume(items):
        for _ in items:
            begun.set()
            assert go.wait(10)

    def give(put):
        for number in range(5):
            put(number)
            given.append(number)

    with feeding(consume) as put:
        giver = threading.Thread(target=give, args=(put,))
        giver.start()
        assert begun.wait(10)
        giver.join(0.3)
        assert given == [0, 1, 2]
        go.set()
        giver.join(10)
    assert given == list(range(5))


def test_its_error_is_raised_at_the_end_and_holds_nobody_up():
    def consume(items):
        next(items)
        raise OSError("full")

    reached = False
    with pytest.raises(OSError, match="full"), feeding(consume) as put:
        for number in range(10):
            put(number)
        reached = True
    assert reached


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_ends_the_items_after_those_it_gave(failure):
    got, cut = [], []

    def consume(items):
        try:
            for item in items:
                got.append(item)
        except Cut as error:
            cut.append(error)
            raise

    with pytest.raises(failure), feeding(consume) as put:
        put(1)
        put(2)
        raise failure
    assert got == [1, 2] and len(cut) == 1
