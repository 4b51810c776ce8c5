"""Which jobs are done, in which order, and what follows for the rest; the answers are made up."""

import functools
from pathlib import Path

import pytest

from maxdiffusion import request
from maxdiffusion.hardware.chips import slice_of
from maxdiffusion.planning import analytic
from maxdiffusion.planning.compilation import Compilation, rank
from maxdiffusion.planning.pool import Answer, Job, Pool
from maxdiffusion.planning.results import Program, Row, Seconds, Stage
from maxdiffusion.planning.splits import splits
from maxdiffusion.weights import official

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30
SIZES = {"transformer": 28 * GIB, "text_encoder": 11 * GIB, "vae": GIB // 4}


class Desk(Pool):
    """In the pool's place: gives made-up answers and notes what it was asked."""

    def __init__(self, answers=lambda cfg, stage: stage_of(stage), most=1000):
        super().__init__({}, 0.0)
        self.answers, self.asked, self.most = answers, [], most

    def map(self, jobs, on_answer):
        for key, job in jobs.items():
            cfg = config.Config.model_validate(job.config)
            self.asked.append((job.stage, cfg.ici_data_parallelism, cfg.ulysses_shards, bool(cfg.logical_axis_rules)))
            late = len(self.asked) > self.most
            answer = None if late else self.answers(cfg, job.stage)
            on_answer(key, answer if answer is None or isinstance(answer, Answer) else Answer(stage=answer))


def stage_of(name, gib=20.0, seconds=1.0, fits=True):
    program = {"text": "text", "denoise": "step", "decode": "decode"}[name]
    took = Seconds(attention=seconds, low=seconds, high=seconds)
    return Stage("compiled", (Program(program, 50, gib, took, 9.0),), fits)


def compilation(desk, name="v6e-8"):
    cfg = request.load([str(CONFIGS / "wan2.1_t2v_14b.yml"), f"plan={name}"]).cfg
    tpu, configs = slice_of(name), official.configs_of(cfg)
    gib = tpu.generation.gib
    found, _ = splits(cfg, 40, tpu.devices, "tpu")
    model = analytic.Model.of(cfg, configs, SIZES, tpu.generation.kind, "tpu")
    rows = {split: Row(split, 50, model.stages(split, plan, gib)) for split, plan in found.items()}
    job = functools.partial(Job, slice=name, gib=gib)
    made = Compilation(cfg, rows, model, desk, gib, job)
    made.run()
    return made


def test_each_split_is_compiled_once_and_what_is_alike_is_shared():
    desk = Desk()
    made = compilation(desk)
    assert [stage for stage, *_ in desk.asked].count("denoise") == 7
    assert [stage for stage, *_ in desk.asked].count("text") == 1
    assert {(data, 8 // data) for stage, data, *_ in desk.asked if stage == "decode"} == {(1, 8), (2, 4)}
    assert not any(sharded for *_, sharded in desk.asked)
    assert desk.asked[0][:2] == ("denoise", 2)  # the cheapest by the rule
    for split, row in made.rows.items():
        assert {stage.source for stage in row.stages.values()} == (
            {"compiled", "derived"} if split.sharded else {"compiled"}
        )
    assert any("derived" in note for note in made.notes())


def test_a_twin_has_less_weights_and_gathers_them():
    made = compilation(Desk())
    whole, spread = (
        next(row for split, row in made.rows.items() if split.ulysses == 8 and split.sharded is sharded)
        for sharded in (False, True)
    )
    saved = whole.stages["denoise"].gib - spread.stages["denoise"].gib
    assert saved == pytest.approx(28 * 7 / 8 - 28 * 2 / 40)
    gathered = 28 * GIB * 7 / 8 / 200e9  # over two links of 100 GB/s
    assert (
        spread.step.exposed == pytest.approx(gathered) and spread.step.total == whole.step.total + spread.step.exposed
    )


def test_where_whole_weights_do_not_fit_the_spread_ones_are_compiled():
    desk = Desk()
    made = compilation(desk, name="v5e-8")
    assert all(sharded for stage, *_, sharded in desk.asked if stage == "denoise")
    derived = [row.stages["denoise"] for split, row in made.rows.items() if not split.sharded]
    assert all(stage.source == "derived" and not stage.fits and stage.gib > 35 for stage in derived)


def test_what_time_has_cut_off_is_modelled_and_said():
    made = compilation(Desk(most=3))
    best = min(made.rows.values(), key=rank)
    assert best.known and best.split.data == 2
    assert any("plan_minutes=12 ended before 7 of 10" in note for note in made.notes())
    assert sum(row.stages["denoise"].source == "modelled" for row in made.rows.values()) == 12


def test_the_recommended_split_is_compiled_even_where_it_was_derived():
    """Whole weights fit no device here by what the compiler says, so that a spread one is best."""

    def answers(cfg, stage):
        much = stage == "denoise" and not cfg.logical_axis_rules
        return stage_of(stage, gib=33.0 if much else 8.0, fits=not much)

    desk = Desk(answers)
    made = compilation(desk)
    best = min(made.rows.values(), key=rank)
    assert best.split.sharded and {stage.source for stage in best.stages.values()} == {"compiled"}
    assert [each[:3] for each in desk.asked if each[3] and each[0] == "denoise"] == [
        ("denoise", best.split.data, best.split.ulysses)
    ]


def test_what_the_compiler_refuses_is_no_row():
    def answers(cfg, stage):
        refused = stage == "denoise" and cfg.ulysses_shards == 8
        return Answer(refused="odd.") if refused else stage_of(stage)

    made = compilation(Desk(answers))
    assert 8 not in {split.ulysses for split in made.rows if not split.sharded}
    assert [(each.name, each.reason) for each in made.refused] == [("ring 1 x ulysses 8", "odd.")]
