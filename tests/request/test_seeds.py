"""Seeds that are drawn when a run starts."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from maxdiffusion import output, request
from maxdiffusion.errors import UserError
from maxdiffusion.request import seeds
from tests.support.output import reserved, write

PAGE = str(Path(__file__).parents[2] / "configs" / "wan_tiny.yml")
LATENTS = np.zeros((1, 1, 12, 12, 8), np.float32)


def write_all(job):
    """Writes each video of a run by itself, as a run would."""
    for video in job.videos:
        with reserved(job, [video], LATENTS) as files:
            write(files, np.zeros((1, 1, 96, 96, 3), np.uint8))
            files.record({}, {})


@pytest.fixture
def load(tmp_path):
    words = [PAGE, f"output_dir={tmp_path}", "num_frames=1", "output_format=png"]
    return lambda *more: request.load([*words, *more])


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["seed=-1"], [-1]),
        (["base_seed=-1", "prompt=[a, b, c]"], [-1, -1, -1]),
        (["prompt=a cat", "seed=[-1, 7, -1]"], [-1, 7, -1]),
        (["seed=4294967295"], [2**32 - 1]),
    ],
)
def test_a_seed_is_drawn_for_each_video_and_said(load, caplog, words, given):
    job = load(*words)
    with caplog.at_level(logging.INFO):
        found = seeds.drawn(job)
    drawn = [video.seed for video in found.videos]
    assert all(0 <= seed < 2**32 for seed in drawn)
    assert [-1 if old < 0 else new for old, new in zip(given, drawn, strict=True)] == given
    assert len(set(drawn)) == len(drawn)
    said = [record.getMessage() for record in caplog.records]
    new = [seed for seed, asked in zip(drawn, given, strict=True) if asked < 0]
    assert all(f"drew {seed} " in text for seed, text in zip(new, said, strict=True))
    assert found.cfg.seed == (tuple(drawn) if -1 in given else job.cfg.seed)
    assert seeds.drawn(found) == found


def test_the_record_and_the_name_have_the_drawn_seed(load, tmp_path):
    job = seeds.drawn(load("prompt=a cat", "seed=-1"))
    (seed,) = job.cfg.seed
    write_all(job)
    record = json.loads((tmp_path / job.cfg.run_name / f"a-cat-seed{seed}-96x96x1.json").read_text())
    assert record["seed"] == seed and record["config"]["seed"] == [seed]


def test_the_same_command_goes_on_with_a_prompt_file(load, tmp_path):
    lines = [{"prompt": "a cat", "seed": -1}, {"prompt": "a dog", "seed": 5}, {"prompt": "an owl"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = (f"prompts={tmp_path}/p.jsonl", "seed=-1")
    job = seeds.drawn(output.remaining(load(*words)))
    names = ["a-cat-seed-random-96x96x1", "a-dog-seed5-96x96x1", "an-owl-seed-random-96x96x1"]
    assert [video.output for video in job.videos] == names
    write_all(job)
    for name, video in zip(names, job.videos, strict=True):
        record = json.loads((tmp_path / job.cfg.run_name / f"{name}.json").read_text())
        assert record["seed"] == video.seed >= 0 and record["config"]["seed"] == [video.seed]
    assert output.remaining(load(*words)).videos == ()
    assert [video.output for video in output.remaining(load(words[0], "seed=6")).videos] == ["an-owl-seed6-96x96x1"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, UserError])
def test_a_stopped_run_leaves_its_draw_to_the_next_of_its_command(load, tmp_path, failure):
    words = ("prompt=[a cat, a dog]", "seed=[-1, -1]")
    folder = tmp_path / load(*words).cfg.run_name
    with pytest.raises(failure), output.drawn(load(*words)) as first:
        (folder / "a state").touch()
        raise failure
    with output.drawn(load(*words)) as second, output.drawn(load(*words)) as third:  # two at once
        assert second == first and len({video.seed for video in (*second.videos, *third.videos)}) == 4
    assert [path.name for path in folder.iterdir()] == ["a state"]
    with output.drawn(load(*words)) as fourth:
        assert fourth.videos != first.videos


def test_a_draw_of_which_nothing_was_made_is_not_kept(load, tmp_path):
    with pytest.raises(UserError), output.drawn(load("prompt=a cat", "seed=-1")) as job:
        assert len(list((tmp_path / job.cfg.run_name).iterdir())) == 1
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []


def test_a_line_may_not_have_another_negative_seed(load, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "seed": -2}')
    with pytest.raises(UserError, match="it must be from 0 to 4294967295, or -1 to draw one"):
        load(f"prompts={tmp_path}/p.jsonl")
