"""Seconds from schedules: by hand, and where hardware's figures are known."""

import dataclasses

import pytest

from maxdiffusion.hardware import links
from maxdiffusion.hardware.chips import GENERATIONS
from maxdiffusion.planning.predict import FLASH, ROWS, cycles, predict
from maxdiffusion.planning.schedule import Choice, Collective, Copy, Done, Kernel, Loop, Work
from maxdiffusion.request.cost import Seconds

V6E = GENERATIONS["v6e"]
SECOND = int(V6E.ghz * 1e9)
# A permutation of so many bytes takes a second.
SIZE = int(V6E.speed.link)


def parts(*steps, **given):
    return without_range(predict(steps, V6E, **given).seconds)


def without_range(seconds):
    return dataclasses.replace(seconds, low=0.0, high=0.0)


def test_loops_multiply_and_kinds_add_up():
    found = parts(Work("a", True, SECOND), Loop(3, (Work("b", False, SECOND), Loop(2, (Work("c", True, SECOND),)))))
    assert found == Seconds(linear=7.0, other=3.0) and found.total == 10


def test_a_collective_is_exposed_by_what_does_not_lie_beside_it():
    begin = Collective("collective-permute", SIZE, (0, 1), "p")
    half = Work("w", False, SECOND // 2)
    assert parts(begin, half, Done("p")) == Seconds(other=0.5, exposed=0.5, hidden=0.5)
    assert parts(begin, half, half, half, Done("p")) == Seconds(other=1.5, hidden=1.0)
    assert parts(Collective("collective-permute", SIZE, (0, 1)), half) == Seconds(other=0.5, exposed=1.0)


def test_two_collectives_share_the_links():
    both = [Collective("collective-permute", SIZE, (0, 1), key) for key in "ab"]
    found = parts(*both, Work("w", False, SECOND), Done("a"), Done("b"))
    assert found == Seconds(other=1.0, exposed=1.0, hidden=1.0)


def test_cores_of_a_chip_do_not_wait_for_its_links():
    rotation = Collective("collective-permute", 10**9, (0, 2), "rotation")
    exchange = Collective("all-to-all", 10**6, (0, 1))
    found = predict((rotation, exchange), GENERATIONS["TPU7x"]).seconds
    assert found.exposed == pytest.approx(links.all_to_all(10**6, 2, 1, GENERATIONS["TPU7x"].speed))


def test_a_conditional_has_its_probability():
    choice = Choice(((Work("a", False, SECOND),), ()))
    assert parts(Loop(40, (choice,))).other == 40
    assert parts(Loop(40, (choice,)), branch_probability=0.2).other == pytest.approx(8)


def test_a_range_widens_with_slow_links():
    work = predict((Work("a", False, SECOND),), V6E).seconds
    assert (work.low, work.high) == (pytest.approx(0.97), pytest.approx(1.09))
    sent = predict((Collective("collective-permute", SIZE, (0, 1)),), V6E).seconds
    assert (sent.low, sent.high) == (pytest.approx(0.97), pytest.approx(2.18))


def test_a_kernel_that_is_not_known_is_named():
    found = predict((Kernel("mystery", ()), Work("a", False, SECOND)), V6E)
    assert found.uncounted == ("mystery",) and without_range(found.seconds) == Seconds(other=1.0)


def flash(block_q, block_kv, tokens, keys, heads=1, dtype="bf16"):
    arrays = [(dtype, (1, heads, n, 128)) for n in (tokens, keys, keys)]
    arrays = [("s32", (1, heads)), *arrays, ("f32", (1, heads, 1, tokens)), (dtype, (1, 1, keys))]
    return Kernel(f"flash_attention_{block_q}_{block_kv}", tuple(arrays))


@pytest.mark.parametrize(
    ("name", "block_q", "block_kv", "tflops"),
    [("v6e", 9472, 6400, 570), ("TPU7x", 9472, 4864, 710), ("v5p", 4736, 3840, 441), ("v5e", 4736, 3840, 189)],
)
def test_a_ring_hop_is_what_was_counted_in_its_whole_schedule(name, block_q, block_kv, tflops):
    """`block_sizes.FLASH`: 18,900 tokens and keys, masked tail and statistics."""
    generation = GENERATIONS[name]
    found = cycles(flash(block_q, block_kv, 18_900, 18_900), generation)
    assert 4 * 18_900**2 * 128 / (found / generation.ghz / 1e9) / 1e12 == pytest.approx(tflops, rel=0.03)


def test_the_ball_of_the_keys_reads_them_twice():
    keys = ("bf16", (1, 2, 4096, 128))
    ball = Kernel("bounding_ball_1024", (("f32", (1,)), keys, ("f32", (1, 1, 4096))))
    found = predict((ball,), V6E)
    assert not found.uncounted
    assert found.seconds.other == pytest.approx(2 * 2 * 2 * 4096 * 128 / V6E.speed.memory)


def test_a_merged_hop_takes_more_in_its_last_steps():
    q, lse = ("bf16", (1, 4, 4096, 128)), ("f32", (1, 4, 1, 4096))
    alone = Kernel("flash_attention_1024_2048", (("f32", (1, 4)), q, q, q, ("f32", (1, 4, 1, 128))))
    merged = Kernel(alone.name, (*alone.operands, ("f32", q[1]), lse))
    assert cycles(merged, V6E) - cycles(alone, V6E) == pytest.approx(4 * 4096 / 256 * FLASH["v6e"].merge)


def test_kernels_over_rows_take_the_longer_of_memory_and_arithmetic():
    rows = ("bf16", (1, 4096, 5120))
    elements = 4096 * 5120

    def seconds(name, generation, *others):
        found = predict((Kernel(name, (rows, *others)),), generation)
        assert not found.uncounted
        return found.seconds.other

    tpu7x = GENERATIONS["TPU7x"]
    assert seconds("rows_join", V6E) == pytest.approx(elements * 4 / V6E.speed.memory)
    assert seconds("rows_join_scaled", V6E) == pytest.approx(elements * 3 / V6E.speed.memory)
    assert seconds("rows_swap", V6E) == pytest.approx(elements * 4 / V6E.speed.memory)
    assert seconds("rows_rotate", tpu7x) == pytest.approx(ROWS["rotate"] * elements / 1024 / (tpu7x.ghz * 1e9))


def test_a_copy_of_unknown_cycles_is_read_and_written_once():
    assert predict((Copy("concatenate.1", 1 << 30),), V6E).seconds.other == pytest.approx((2 << 30) / V6E.speed.memory)


def test_a_kernel_scales_with_heads_blocks_and_dtype():
    one = cycles(flash(2048, 1024, 4096, 4096), V6E)
    assert cycles(flash(2048, 1024, 4096, 4096, heads=5), V6E) == pytest.approx(5 * one)
    assert cycles(flash(2048, 1024, 8192, 4096), V6E) == pytest.approx(2 * one)
    assert cycles(flash(2048, 1024, 4096, 4096, dtype="f32"), V6E) == pytest.approx(6 * one)
    assert cycles(flash(2048, 1024, 4096, 4096), V6E, running=True) > one


def test_queries_and_keys_in_8_bits_are_faster_where_the_chip_is():
    exact, narrow = (flash(4096, 4096, 4096, 4096, dtype=dtype) for dtype in ("bf16", "f8e4m3fn"))
    assert cycles(narrow, GENERATIONS["TPU7x"]) < 0.8 * cycles(exact, GENERATIONS["TPU7x"])
    assert cycles(narrow, V6E) == cycles(exact, V6E)


def test_splash_is_slower_than_our_own():
    splash = Kernel("splash_mha_fwd_residuals", (("s32", (3, 4, 2)), *[("bf16", (1, 4096, 128))] * 3))
    assert cycles(splash, V6E) > cycles(flash(2048, 2048, 4096, 4096), V6E)


@pytest.mark.parametrize(
    ("static", "hardware"),
    [(20.33e-3, 21.15e-3), (22.04e-3, 22.65e-3), (2.67, 2.633), (2.81, 2.733), (2.60, 2.633), (5.79, 6.29)],
)
def test_the_range_holds_what_was_measured(static, hardware):
    """Of another implementation: a ring hop on TPU7x with a bound and a running maximum, guided steps of the 14B model
    on TPU7x-8 (with modelled collectives, with a running maximum, without collectives), and on v6e-8."""
    found = predict((Work("all of it", False, int(static * SECOND)),), V6E).seconds
    assert found.low <= hardware <= found.high


def test_the_collectives_of_a_published_step():
    """Of the 14B model on TPU7x-8, U2 R2: in each of 40 layers four all-to-alls of 193.5 MB between the cores of a
    chip, and a rotation of k and v that a hop of 20 ms covers."""
    speed = GENERATIONS["TPU7x"].speed
    share = 18_900 * 40 * 128 * 2
    exchange = 40 * 4 * links.all_to_all(share, 2, 1, speed)
    assert exchange == pytest.approx(0.026, rel=0.02)
    assert 2 * links.permute(share, 2, 2, speed) < 20.33e-3
