"""The command itself, on this machine's processor: compiled once, then known without jax; each mistake one sentence."""

import json
import resource
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import numpy as np
import pytest

from maxdiffusion import cli, generate_wan, request
from maxdiffusion.planning import command
from maxdiffusion.programs import programs
from maxdiffusion.request.nets import read_configs
from maxdiffusion.request.session import Setup
from tests.support import sounds

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TINY = [str(CONFIGS / "wan_tiny.yml"), "size=16*16", "num_frames=1", "num_inference_steps=4"]
PROGRAM = """
import atexit, sys
atexit.register(lambda: print("HEAVY", sorted({'jax', 'flax', 'numpy'} & set(sys.modules))))
from maxdiffusion.cli import main
main()
"""


def plan(folder: Path, *words: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", PROGRAM, *words]
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(folder)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, preexec_fn=limited
    )


@pytest.mark.slow
def test_a_plan_of_this_machine_is_made_once_and_then_known(tmp_path):
    words = [*TINY, "plan=here", "jax_cache_dir=cache/xla"]
    first = plan(tmp_path, *words, "plan_file=[plan.json, plan.svg]", "price_per_chip_hour=3600")
    assert first.returncode == 0, first.stderr
    said = first.stdout
    assert "1 frames, 4 steps: 4 of transformer with guidance (8 passes)\non this machine (1 x cpu" in said
    assert "of which   text" in said and "loading 0.0" in said
    assert (
        "recommended  ring 1 x ulysses 1, weights whole (compiled)" in said and "modelled" not in said.split("notes")[0]
    )
    found = json.loads((tmp_path / "plan.json").read_text())
    assert "predicted, not measured: nothing was run on these devices" in said and len(found["notes"]) == 2
    best = found["recommended"]
    assert best["fits"] and best["sources"] == dict.fromkeys(["text", "denoise", "decode"], "compiled")
    assert all(0 < gib < 1 for gib in best["gib"].values())
    assert best["price"] == pytest.approx(best["seconds"]["total"], abs=1e-3) and found["chips"] == 1
    assert best["command"] in said and "size=16*16" in best["command"] and "plan=" not in best["command"]
    assert ET.parse(tmp_path / "plan.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "plan.json", "plan.svg"]

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    second = plan(tmp_path, *words, "prompt=a cat")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert second.stdout.splitlines()[-1] == "HEAVY []" and "compiling" not in second.stderr
    same = said.replace(", 3", "|").splitlines()[-8:-1]
    assert same == second.stdout.replace(", 3", "|").splitlines()[-8:-1]
    # Processor time, so that a busy machine does not fail the test: 0.5 s measured.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5

    full = plan(tmp_path, *words, "plan_file=late.json", limit=64)
    assert full.returncode == 2 and "cannot write late.json: the file would be larger" in full.stderr
    assert not (tmp_path / "late.json").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["plan=v6e-7"], "There is no slice v6e-7: choose one of v6e-1, v6e-4, v6e-8"),
        (["plan=v6e:3x3"], "v6e:3x3 is not a topology of v6e; choose one of "),
        (["plan=h100-8"], "'h100-8' is not a TPU slice"),
        (["plan=auto"], "plan=auto finds no TPU here; name a slice"),
        (["plan=v6e-8", "attention=ulysses", "ici_data_parallelism=1"], "ulysses_shards=8 cannot split 12 heads"),
        (["plan=v6e-8", "ici_context_parallelism=16"], "but there are 8"),
        (["plan=v6e-8", "attention=cudnn_flash"], "attention=cudnn_flash needs a kernel that this installation lacks"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, capsys, monkeypatch):
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    assert cli.command([str(CONFIGS / "wan2.1_t2v_1.3b.yml"), "jax_cache_dir=", *words]) == 2
    out, err = capsys.readouterr()
    assert sentence in err and err.count("\n") == 1 and not out


DEFAULT = ("wan2.1_vace_1.3b", "wan2.2_i2v_a14b", "wan2.2_animate_14b")
PAGES = [
    pytest.param(page, marks=() if page.stem in DEFAULT else pytest.mark.slow)
    for page in sorted(CONFIGS.glob("wan2*.yml"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_without_libtpu_every_variant_has_an_analytic_plan(page, capsys, monkeypatch):
    monkeypatch.setattr("maxdiffusion.planning.command.libtpu", lambda: False)
    assert cli.command([str(page), "jax_cache_dir=", "plan=v5p-16", "log_level=error"]) == 0
    said = capsys.readouterr().out
    assert "analytic: libtpu, which compiles for TPUs, is not installed" in said
    assert "sizes are those of the official one of wan2" in " ".join(said.split())
    assert "recommended" in said and "compiled)" not in said


def test_the_plan_of_a_sound_says_in_how_many_segments_it_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("maxdiffusion.planning.command.libtpu", lambda: False)
    sound = sounds.write(tmp_path / "a.wav", np.zeros(240 * 8000), 8000)
    words = [f"audio={sound}", "jax_cache_dir=", "plan=v6e-8", "log_level=error"]
    assert cli.command([str(CONFIGS / "v6e-8" / "wan2.2_s2v_14b.yml"), *words]) == 0
    assert "3837 frames in 48 segments" in capsys.readouterr().out  # 240 s at 16 per second without three, by 80


@pytest.mark.parametrize("page", sorted(CONFIGS.glob("wan2*.yml")), ids=lambda page: page.stem)
def test_jobs_have_the_images_that_a_variant_needs(page, monkeypatch):
    """What a worker would compile, as a worker has it: nothing is missing that the networks take."""
    jobs = {}
    monkeypatch.setattr("maxdiffusion.planning.pool.Pool.map", lambda pool, wanted: jobs.update(wanted) or ())
    monkeypatch.setattr("maxdiffusion.planning.command.libtpu", lambda: True)
    command.make(request.load([str(page), "jax_cache_dir=", "plan=v6e-8"]))
    job = next(iter(jobs.values())).args[0]
    found = list(programs(Setup.of(job, read_configs(job), jax.devices()[:8])))
    names = {program.name for program in found}
    assert names >= {"text", "prepare", "step", "decode"}
    assert ("image" in names) == ("image_encoder" in job.spec.nets)
    next(program for program in found if program.name == "prepare").lowered  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["taylor", "spectrum"])
def test_a_plan_counts_the_steps_that_a_cache_computes(tmp_path, capsys, monkeypatch, cache):
    monkeypatch.setattr("maxdiffusion.planning.command.libtpu", lambda: False)
    words = [
        *TINY[:3],
        "prompt=a circle",
        "num_inference_steps=14",
        f"cache={cache}",
        "jax_cache_dir=",
        "log_level=error",
    ]
    plans = {}
    for name, more in (("with", words), ("without", [word for word in words if "cache=" not in word])):
        assert cli.command([*more, "plan=v6e-1", f"plan_file={tmp_path}/{name}.json"]) == 0
        plans[name] = json.loads((tmp_path / f"{name}.json").read_text())
    said = " ".join(capsys.readouterr().out.split())
    job = request.load([*words, f"save_file={tmp_path}/a.png"])
    generate_wan.run(job)
    (segment,) = json.loads((tmp_path / "a.json").read_text())["cache"]["computed"]
    count, calls = len(segment["prompt"]), sum(map(len, segment.values()))
    assert f"14 steps, {count} computed: {count} of transformer with guidance ({calls} passes)" in said
    found, all_of_them = (plans[name]["recommended"] for name in ("with", "without"))
    assert (found["steps"], all_of_them["steps"]) == (count, 14)
    seconds = [each["stage_seconds"]["denoise"]["total"] for each in (found, all_of_them)]
    assert seconds[0] == pytest.approx(seconds[1] * count / 14, rel=1e-2)
    listed = programs(Setup.of(job, read_configs(job), jax.devices()[:1]))
    assert sum(each.times for each in listed if each.name == "step") == count


def test_a_plan_counts_the_steps_of_both_sizes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("maxdiffusion.planning.command.libtpu", lambda: False)
    words = [TINY[0], "size=64*64", "num_frames=1", "num_inference_steps=14", "jax_cache_dir=", "log_level=error"]
    seconds = {}
    for steps in ("", "low_resolution_steps=9", "low_resolution_steps=9 cache=spectrum"):
        assert (
            cli.command([*words, *steps.split(), "plan=v6e-1", f"plan_file={tmp_path}/a.json", "overwrite=true"]) == 0
        )
        best = json.loads((tmp_path / "a.json").read_text())["recommended"]
        seconds[steps] = best["stage_seconds"]["denoise"]["total"]
        job = request.load([*words, *steps.split(), "prompt=a"])
        listed = [each for each in programs(Setup.of(job, read_configs(job), jax.devices()[:1])) if each.name == "step"]
        assert sum(each.times for each in listed) == best["steps"]
    said = " ".join(capsys.readouterr().out.split())
    assert "9 of transformer at half height and width with guidance (18 passes), 5 of transformer with" in said
    assert "14 steps, 12 computed: 7 of transformer at half height and width with" in said
    whole, halved, cached = seconds.values()
    assert 5 / 14 * whole < halved < whole and cached < halved
    whole_size = ["tensor<1x1x8x8x" in each.lowered.as_text() for each in listed]
    assert [each.times for each in listed] == [7, 5] and whole_size == [False, True]


def test_where_nothing_fits_the_nearest_changes_are_named(capsys, monkeypatch):
    monkeypatch.setattr("maxdiffusion.planning.command.libtpu", lambda: False)
    words = ["jax_cache_dir=", "plan=v5e-4", "log_level=error"]
    assert cli.command([str(CONFIGS / "wan2.2_t2v_a14b.yml"), *words]) == 0
    said = capsys.readouterr().out
    assert "NOTHING FITS: the nearest split" in said
    assert "expert_residency=in_turn ici" in said and "plan=v5e-8 ici" in said and "num_frames=" in said
