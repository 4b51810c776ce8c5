"""Which jobs are done, in which order, and what follows for the rest; the answers are made up."""

from pathlib import Path

import pytest

from maxdiffusion import request
from maxdiffusion.errors import UserError
from maxdiffusion.hardware.chips import slice_of
from maxdiffusion.planning.compilation import Compilation
from maxdiffusion.planning.pool import Pool
from maxdiffusion.planning.results import Stage, Target
from maxdiffusion.planning.splits import splits
from maxdiffusion.planning.worker import Answer
from maxdiffusion.request import cost
from maxdiffusion.request.cost import Figures, Seconds
from maxdiffusion.request.nets import read_configs
from maxdiffusion.request.session import recipe_of

PAGE = Path(__file__).parents[2] / "configs" / "wan2.1_t2v_14b.yml"


class Desk(Pool):
    """In the pool's place: gives made-up answers and notes what it was asked."""

    def __init__(self, answers=lambda cfg, stage: stage_of(stage), most=1000):
        super().__init__({}, 0.0)
        self.answers, self.asked, self.most = answers, [], most

    def map(self, jobs):
        for key, job in jobs.items():
            cfg, stage = job.args[0].cfg, job.args[1]
            self.asked.append((stage, cfg.ici_data_parallelism, cfg.ulysses_shards, bool(cfg.logical_axis_rules)))
            answer = None if len(self.asked) > self.most else self.answers(cfg, stage)
            yield key, Answer(answer) if isinstance(answer, Stage) else answer


def stage_of(name, gib=20.0, seconds=1.0, fits=True):
    program = {"text": "text", "denoise": "step", "decode": "decode"}[name]
    took = Seconds(attention=seconds, low=seconds, high=seconds)
    return Stage("compiled", (Figures(program, 50, gib, took),), fits)


def compilation(desk, name="v6e-8"):
    job = request.load([str(PAGE), f"plan={name}"])
    tpu = slice_of(name)
    target = Target(tpu, "tpu", tpu.generation.kind, tpu.devices, tpu.generation.gib)
    run = cost.Run.of(job, recipe_of(job), read_configs(job), target.kind, target.platform)
    layouts, _ = splits(run, target.devices)
    made = Compilation(run, layouts, desk, target)
    made.compile()
    return made


def test_each_split_is_compiled_once_and_what_is_alike_is_shared():
    desk = Desk()
    made = compilation(desk)
    assert [stage for stage, *_ in desk.asked].count("denoise") == 7
    assert [stage for stage, *_ in desk.asked].count("text") == 1
    assert {(data, 8 // data) for stage, data, *_ in desk.asked if stage == "decode"} == {(1, 8), (2, 4)}
    assert not any(sharded for *_, sharded in desk.asked)
    assert desk.asked[0][:2] == ("denoise", 2)  # the cheapest by arithmetic
    assert all((row.source == "compiled") != made.layouts[words].sharded for words, row in made.rows.items())
    assert made.notes() == ["modelled: not compiled, arithmetic alone"]


def test_where_whole_weights_cannot_fit_the_spread_ones_are_compiled():
    desk = Desk()
    made = compilation(desk, name="v5e-8")
    assert all(sharded for stage, *_, sharded in desk.asked if stage == "denoise")
    whole = [row.stages["denoise"] for words, row in made.rows.items() if not made.layouts[words].sharded]
    assert all(stage.source == "modelled" and not stage.fits and stage.gib > 27 for stage in whole)


def test_what_time_has_cut_off_is_modelled_and_said():
    made = compilation(Desk(most=3))
    best = min(made.rows.values(), key=lambda row: row.rank)
    assert best.source == "compiled" and made.layouts[best.overrides].data == 2
    assert any("plan_minutes=12 ended before 7 of 10 compilations; run again" in note for note in made.notes())
    assert sum(row.stages["denoise"].source == "modelled" for row in made.rows.values()) == 13


def test_where_nothing_is_kept_no_second_ask_is_advised():
    made = compilation(Desk(lambda cfg, stage: Answer(stage_of(stage), unkept="the disk is full"), most=3))
    assert "plan_minutes=12 ended before 7 of 10 compilations" in made.notes()
    assert "what was compiled is not kept for the next plan: the disk is full" in made.notes()


def test_where_whole_weights_do_not_fit_by_the_compiler_the_spread_ones_are_compiled():
    def answers(cfg, stage):
        much = stage == "denoise" and not cfg.logical_axis_rules
        return stage_of(stage, gib=33.0 if much else 8.0, fits=not much)

    desk = Desk(answers)
    made = compilation(desk)
    best = min(made.rows.values(), key=lambda row: row.rank)
    assert made.layouts[best.overrides].sharded and all(row.source == "compiled" for row in made.rows.values())
    assert sum(sharded for stage, *_, sharded in desk.asked if stage == "denoise") == 7


def test_what_the_compiler_refuses_is_no_row():
    def answers(cfg, stage):
        refused = stage == "denoise" and cfg.ulysses_shards == 8
        return Answer(None, "odd.") if refused else stage_of(stage)

    made = compilation(Desk(answers))
    assert 8 not in {made.layouts[w].attention.ulysses for w in made.rows if not made.layouts[w].sharded}
    assert [(each.split, each.reason) for each in made.refused] == [("ring 1 x ulysses 8", "odd.")]


def test_a_worker_that_fails_leaves_the_rest():
    def answers(cfg, stage):
        return UserError("it was killed.") if stage == "denoise" and cfg.ulysses_shards == 8 else stage_of(stage)

    made = compilation(Desk(answers))
    assert sum(row.source == "compiled" for row in made.rows.values()) == 6
    assert "1 of 10 compilations failed: it was killed." in made.notes()
    with pytest.raises(UserError, match="it was killed"):
        compilation(Desk(lambda cfg, stage: UserError("it was killed.")))
