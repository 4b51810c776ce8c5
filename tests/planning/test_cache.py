"""What is kept of plans and of programs, and what it is known by."""

import dataclasses
from pathlib import Path

import pytest

from maxdiffusion import request
from maxdiffusion.planning import cache, worker
from maxdiffusion.planning.cache import Cache
from maxdiffusion.request.nets import read_configs

PAGE = Path(__file__).parents[2] / "configs" / "wan2.1_t2v_14b.yml"


@dataclasses.dataclass
class Kept:
    value: str


@dataclasses.dataclass
class Other:
    value: int


def test_what_is_kept_is_found_beside_the_compiled_programs(tmp_path):
    folder = tmp_path / "here" / "xla"
    assert Cache(str(folder)).read("a", Kept) is None
    assert Cache(str(folder)).write("a", Kept("one")) == ""
    Cache(str(folder)).write("a", Kept("two"))
    Cache(str(folder)).write("b", Kept("three"))
    assert Cache(str(folder)).read("a", Kept) == Kept("two") and Cache(str(folder)).read("b", Other) is None
    assert sorted(path.name for path in (tmp_path / "here" / "plans").iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize("off", ["", "none"])
def test_without_a_folder_nothing_is_kept(off, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Cache(off).write("a", Kept("one"))
    assert Cache(off).read("a", Kept) is None and not list(tmp_path.iterdir())


def test_where_it_cannot_be_written_it_says_why(tmp_path):
    (tmp_path / "plans").write_text("no folder")
    why = Cache(str(tmp_path / "xla")).write("a", Kept("one"))
    assert why.startswith("cannot write ") and "a part of its path is a file, not a folder" in why


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}',
        b'{"gib": 1.0}',
        b'{"gib": 1.0, "seconds": {}, "fault": "", "refused": "", "a": 1}',
        b'{"gib": -1.0, "seconds": {}, "fault": "", "refused": ""}',
        b"{}",
        b"",
    ],
)
def test_an_entry_of_something_else_is_not_believed(content, tmp_path):
    store = Cache(str(tmp_path / "xla"))
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "a.json").write_bytes(content)
    assert store.read("a", worker.Compiled) is None


def test_a_plan_is_known_by_all_that_it_follows_from():
    job = request.load([str(PAGE), "plan=v6e-8"])
    configs = read_configs(job)

    def changed(key, value):
        return request.job_of(job.cfg.model_copy(update={key: value}))

    base = cache.asked(job, configs, "v6e:2x4")
    same = {"seed": (5,), "prompt": ("a",), "progress": "off", "price_per_chip_hour": 3.0, "plan_minutes": 9.0}
    other = {"num_frames": 41, "prompt": ("a", "b"), "vae_dtype": "bfloat16", "scan_layers": False}
    for key, value in same.items():
        assert cache.asked(changed(key, value), configs, "v6e:2x4") == base, key
    for key, value in other.items():
        assert cache.asked(changed(key, value), configs, "v6e:2x4") != base, key
    smaller = {**configs, "transformer": dataclasses.replace(configs["transformer"], num_layers=2)}
    assert base not in (cache.asked(job, smaller, "v6e:2x4"), cache.asked(job, configs, "v6e:4x4"))


def test_a_program_is_known_by_its_name_its_text_and_what_it_is_compiled_for():
    base = cache.program("step", "module", "v6e:2x4")
    assert cache.program("step", "module", "v6e:2x4") == base
    others = [("decode", "module", "v6e:2x4"), ("step", "module2", "v6e:2x4"), ("step", "module", "v5e:2x4")]
    assert all(cache.program(*other) != base for other in others)
