"""The rule that chooses a split, against the orders that are known, and its parts against arithmetic."""

import logging
import subprocess
import sys

import pytest

from maxdiffusion.attention import auto
from maxdiffusion.attention.plan import AttentionPlan, plans
from maxdiffusion.errors import UserError

KINDS = {"TPU7x": "tpu", "TPU v6 lite": "tpu", "TPU v5": "tpu", "TPU v5 lite": "tpu", "H100": "gpu", "cpu": "cpu"}


def candidates(heads=40, devices=8, pair=(1, 2), **given):
    found, refused = {}, {}
    for data in pair:
        legal, illegal = plans("ulysses_ring", heads=heads, context=devices // data, **given)
        found |= {(data, ulysses): plan for ulysses, plan in legal.items()}
        refused |= {(data, ulysses): error for ulysses, error in illegal.items()}
    return found, refused


def ranked(kind, tokens=75_600, branches=2, **given):
    found, _ = candidates(platform=KINDS[kind], **given)
    work = auto.Work(tokens, 128, branches, kind, KINDS[kind])
    return sorted(found, key=lambda key: auto.cost(found[key], key[0], work).total)


def test_tpu7x_joins_a_chip_by_ulysses_and_chips_by_a_ring():
    """Published for eight TPU7x, 14B at 75,600 tokens: data 2, U2 R2, before pure Ulysses."""
    order = ranked("TPU7x")
    assert order[0] == (2, 2)
    assert order.index((2, 2)) < order.index((2, 4)) < order.index((1, 4))


@pytest.mark.parametrize("tokens", [75_600, 32_760])
def test_v6e_prefers_ulysses(tokens):
    """Published for eight v6e: data 2, Ulysses 4. With or without the pair on the data axis, a ring alone is last."""
    order = ranked("TPU v6 lite", tokens)
    assert order[0] == (2, 4)
    alone = ranked("TPU v6 lite", tokens, pair=(1,), branches=1)
    assert alone[-1] == (1, 1) and order[-1] == (1, 1)


def test_heads_limit_the_choice():
    assert {ulysses for data, ulysses in ranked("TPU v6 lite", heads=12) if data == 1} == {1, 2, 4}
    assert ranked("TPU v6 lite", heads=7, pair=(1,)) == [(1, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_cost_is_finite_and_scales_with_the_branches(kind):
    for key, plan in candidates(platform=KINDS[kind])[0].items():
        one, two = (auto.cost(plan, 1, auto.Work(32_760, 128, n, kind, KINDS[kind])) for n in (1, 2))
        assert 0 < one.total < float("inf"), key
        assert two.compute == pytest.approx(2 * one.compute) and two.exchange == pytest.approx(2 * one.exchange)
        assert auto.cost(plan, 2, auto.Work(32_760, 128, 2, kind, KINDS[kind])) == one


def test_the_parts_by_hand():
    """14B, 75,600 tokens, one branch on four devices: 18,900 tokens x 40 heads x 128 x 2 bytes = 193.5 MB a share."""
    share = 18_900 * 40 * 128 * 2
    plan = AttentionPlan("ulysses_ring", "tokamax_splash", 2, 2, 40)
    v6e, v7x = (auto.cost(plan, 1, auto.Work(75_600, 128, 1, kind, "tpu")) for kind in ("TPU v6 lite", "TPU7x"))
    assert v6e.compute == pytest.approx(4 * 20 * 128 * 75_600 * 37_800 / 521e12, rel=0.01)
    assert v7x.exchange == pytest.approx(4 * share / 2 / 600e9)
    assert v6e.exchange == pytest.approx(4 * share / 200e9)
    wide = AttentionPlan("ulysses", "tokamax_splash", 1, 8, 40)
    assert auto.cost(wide, 1, auto.Work(151_200, 128, 1, "TPU v6 lite", "tpu")).exchange == pytest.approx(
        4 * share / 100e9
    )


def test_a_rotation_counts_where_no_kernel_hides_it():
    plan = AttentionPlan("ring", "tokamax_splash", 8, 1, 40)
    long, short = (auto.cost(plan, 1, auto.Work(n, 128, 1, "TPU7x", "tpu")) for n in (151_200, 2_000))
    assert long.rotation == 0 < short.rotation
    assert auto.cost(plan, 1, auto.Work(151_200, 128, 1, "TPU7x", "tpu", slices=2)).rotation > 0


def test_the_choice_is_told_with_the_runners_up_and_what_is_illegal(caplog):
    found, refused = candidates(heads=12, platform="tpu")
    with caplog.at_level(logging.INFO):
        assert auto.choose(found, refused, auto.Work(32_761, 128, 2, "TPU7x", "tpu")) == (2, 2)
    lines = caplog.text.splitlines()
    assert "the guidance pair over data 2, ring 2 x ulysses 2, modelled" in lines[0] and "compute" in lines[0]
    assert sum("rather than" in line for line in lines) == len(found) - 1
    assert "not data 1, ulysses 8: ulysses_shards=8 cannot split 12 heads; choose 1 or 2 or 4" in lines[-1]


def test_nothing_legal_says_why():
    found, refused = candidates(heads=12, pair=(1,), chunks=5)
    assert not found
    with pytest.raises(UserError, match="ulysses_shards=8 cannot split 12 heads"):
        auto.choose(found, refused, auto.Work(32_760, 128, 2, "cpu", "cpu"))


def test_the_rule_needs_no_jax():
    code = "import sys, maxdiffusion.attention.auto; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
