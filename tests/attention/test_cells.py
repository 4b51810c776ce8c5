"""Cells of `ulysses_shards=auto`: what they are found by, and that auto follows them."""

import dataclasses
import logging

import pytest

from maxdiffusion.attention import auto, cells
from maxdiffusion.attention.cells import Cell, Place
from maxdiffusion.attention.options import KernelOptions
from maxdiffusion.attention.plan import AttentionPlan, plans
from maxdiffusion.hardware.chips import GENERATIONS

V6E = "TPU v6 lite"
PLACE = Place(V6E, 8, 40, 128, 1234, 2)
WORK = auto.Work(1234, 128, 2, V6E, "tpu")


def found(**given):
    result = {}
    for data in (1, 2):
        legal, _ = plans("auto", heads=40, context=8 // data, platform="tpu", **given)
        result |= {(data, ulysses): plan for ulysses, plan in legal.items()}
    return result


@pytest.fixture
def table(monkeypatch):
    """One cell, in which the ring alone is fastest, which no rule would say."""
    seconds = {key: 10.0 - plan.ring + key[0] for key, plan in found().items()}
    monkeypatch.setattr(cells, "table", lambda: {PLACE: Cell("compiled", seconds)})
    return seconds


def test_auto_follows_a_cell_and_says_where_it_is_from(table, caplog):
    caplog.set_level(logging.INFO, "maxdiffusion")
    assert auto.choose(found(), {}, WORK) == (1, 1)
    assert "ring 8 x ulysses 1, planned (compiled) 3 s" in caplog.text and "modelled" not in caplog.text


@pytest.mark.parametrize("changes", [{"tokens": 1235}, {"branches": 1}, {"device_kind": "TPU v5"}, {"slices": 2}])
def test_elsewhere_the_rule_decides(table, changes, caplog):
    caplog.set_level(logging.INFO, "maxdiffusion")
    auto.choose(found(), {}, dataclasses.replace(WORK, **changes))
    assert "modelled" in caplog.text and "planned" not in caplog.text


def test_a_kernel_with_other_options_was_not_planned(table):
    assert cells.find(found(), V6E, 128, 1234, 2) is not None
    assert cells.find(found(options=KernelOptions(block_q=256)), V6E, 128, 1234, 2) is None


def test_a_cell_that_lacks_a_split_is_no_answer(table):
    table.pop((2, 4))
    assert cells.find(found(), V6E, 128, 1234, 2) is None


def test_what_is_given_narrows_the_choice(table):
    some = {key: plan for key, plan in found().items() if key[1] == 4}
    assert auto.choose(some, {}, WORK) == (1, 4)


def test_the_table_that_is_shipped():
    table = cells.table()
    assert cells.parse(cells.dump(table)).keys() == table.keys()
    assert {place.kind for place in table} == {each.kind for each in GENERATIONS.values()}
    assert {(place.heads, place.tokens) for place in table} >= {(12, 32_760), (40, 32_760), (40, 75_600), (24, 27_280)}
    for place, cell in table.items():
        assert cell.source in ("compiled", "modelled") and place.devices in (8, 16, 32)
        for data, ulysses in cell.seconds:
            AttentionPlan("ulysses_ring", "flash", place.devices // data // ulysses, ulysses, place.heads)
        assert all(0 < seconds < 1e5 for seconds in cell.seconds.values())
