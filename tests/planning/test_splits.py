"""Which splits a plan looks at, and what it says of the others."""

from pathlib import Path

import pytest

from maxdiffusion import request
from maxdiffusion.errors import UserError
from maxdiffusion.planning.splits import splits
from maxdiffusion.request import cost
from maxdiffusion.request import layout as layout_of
from maxdiffusion.request.nets import read_configs
from maxdiffusion.request.session import recipe_of

CONFIGS = Path(__file__).parents[2] / "configs"


def found(*words, page="wan2.1_t2v_14b"):
    job = request.load([str(CONFIGS / f"{page}.yml"), "plan=v6e-8", *words])
    run = cost.Run.of(job, recipe_of(job), read_configs(job), "TPU v6 lite", "tpu")
    legal, refused = splits(run, 8)
    for words, layout in legal.items():
        tried = request.on_mesh(job, words).cfg  # the words are ones that the command takes
        assert tried.ulysses_shards in (layout.attention.ulysses, -1)
        plans, _ = layout_of.legal_plans(tried, run.network, "tpu", [None] * 8)
        assert layout_of.layout(tried, plans[layout.attention.ulysses], [None] * 8) == layout
    return legal, refused


def names(legal):
    return {(each.data, each.attention.ring, each.attention.ulysses, each.sharded) for each in legal.values()}


def test_all_that_is_open_is_tried():
    legal, refused = found()
    whole = {(1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8), (2, 4, 1), (2, 2, 2), (2, 1, 4)}
    assert names(legal) == {(*degrees, sharded) for degrees in whole for sharded in (False, True)}
    assert not refused
    words = {words for words, layout in legal.items() if (layout.data, layout.attention.ulysses) == (2, 4)}
    sharded = "logical_axis_rules=[[embed,[fsdp,context]]]"
    assert words == {
        ("ici_data_parallelism=2", "ulysses_shards=4"),
        ("ici_data_parallelism=2", "ulysses_shards=4", sharded),
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ulysses_shards=4", "ici_data_parallelism=1", "ici_fsdp_parallelism=1"], {(1, 2, 4, False), (1, 2, 4, True)}),
        (["attention=ring", "ici_data_parallelism=2"], {(2, 4, 1, False), (2, 4, 1, True)}),
        (["guidance_scale=1", "ulysses_shards=8"], {(1, 1, 8, False), (1, 1, 8, True)}),
        (["guidance_mode=two_pass", "ulysses_shards=8"], {(1, 1, 8, False), (1, 1, 8, True)}),
        (["ici_fsdp_parallelism=8", "ici_data_parallelism=1"], {(1, 1, 1, False)}),
        (["ulysses_shards=8", "ici_data_parallelism=1", "logical_axis_rules=[[embed, null]]"], {(1, 1, 8, False)}),
        (  # four windows
            ["num_frames=285", "context_window=81", "guidance_scale=1", "logical_axis_rules=[[embed, null]]"],
            {(d, 8 // d // u, u, False) for d in (1, 2, 4) for u in (1, 2, 4, 8) if d * u <= 8},
        ),
        (["ulysses_shards=8", "ici_data_parallelism=1", "logical_axis_rules=[[embed, context]]"], {(1, 1, 8, True)}),
    ],
)
def test_what_is_given_stays(words, expected):
    assert names(found(*words)[0]) == expected


def test_rules_that_are_given_stay_beside_the_planned_one():
    legal, _ = found("ulysses_shards=8", "ici_data_parallelism=1", "logical_axis_rules=[[mlp, null]]")
    (word,) = {word for words in legal for word in words if word.startswith("logical")}
    assert word == "logical_axis_rules=[[embed,[fsdp,context]],[mlp,null]]"


def test_keys_that_are_gathered_are_named_so():
    legal, _ = found("attention=flash", "ici_data_parallelism=1")
    assert {layout.name for layout in legal.values()} == {"context 8, keys gathered"}


def test_several_videos_may_lie_side_by_side():
    legal, _ = found("prompt=[a, b]")
    assert {layout.data for layout in legal.values()} == {1, 2, 4}


@pytest.mark.parametrize(("scales", "data"), [((1, 1), {1}), ((3, 1), {1, 2}), ((1, 3), {1, 2}), ((3, 3), {1, 2})])
def test_the_pair_may_split_where_either_expert_is_guided(scales, data):
    words = [f"{key}={scale}" for key, scale in zip(("guidance_scale", "guidance_scale_2"), scales, strict=True)]
    legal, _ = found(*words, page="wan2.2_t2v_a14b")
    assert {layout.data for layout in legal.values()} == data


def test_a_refused_split_has_the_sentence_of_the_run():
    legal, refused = found(page="wan2.1_t2v_1.3b")
    assert {layout.attention.ulysses for layout in legal.values()} == {1, 2, 4}
    assert [each.split for each in refused] == ["ring 1 x ulysses 8"]
    assert "ulysses_shards=8 cannot split 12 heads; choose 1 or 2 or 4" in refused[0].reason


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["attention=ulysses"],
            "ulysses_shards=8 cannot split 12 heads; choose 1 or 2 or 4, with attention=ulysses_ring.",
        ),
        (["ici_context_parallelism=3"], "but there are 8"),
        (["dcn_context_parallelism=2"], "dcn parallelism context 2 needs"),
    ],
)
def test_where_nothing_is_legal_it_says_why(words, sentence):
    with pytest.raises(UserError) as error:
        found("ici_data_parallelism=1", *words, page="wan2.1_t2v_1.3b")
    assert sentence in str(error.value)
