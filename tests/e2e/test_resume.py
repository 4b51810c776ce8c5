"""A run that is stopped goes on where it was: on any mesh, by both loops, with experts, segments and prompt files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maxdiffusion import cli, programs
from maxdiffusion.output.states import States
from maxdiffusion.weights.latents_io import load_latents
from tests.support.bucket import Bucket, bucket

__all__ = ["bucket"]  # a fixture

ROOT = Path(__file__).parents[2]
STEPS = 8
ONE = ("ici_data_parallelism=-1", "ici_context_parallelism=1")
EIGHT = ("attention=ulysses_ring", "ulysses_shards=2", "ici_context_parallelism=8")
FOUR = ("attention=ulysses_ring", "ulysses_shards=1", "ici_context_parallelism=4", "ici_fsdp_parallelism=2")

TWO_BY_FOUR = ("attention=ulysses_ring", "ulysses_shards=2", "ici_data_parallelism=2", "ici_context_parallelism=4")
WINDOWS = ("num_frames=21", "context_window=9", "context_overlap=4")  # three of 3 latent frames over 6


def words(out, *more):
    return [
        str(ROOT / "configs" / "wan_tiny.yml"),
        f"pretrained_model_name_or_path={ROOT / 'models' / 'wan_tiny'}",
        *(word for word in ("size=48*32", "num_frames=5", f"num_inference_steps={STEPS}") if not _given(word, more)),
        f"output_dir={out}",
        "run_name=r",
        "jax_cache_dir=",
        "log_level=info",
        *more,
    ]


def _given(word, words):
    return any(other.partition("=")[0] == word.partition("=")[0] for other in words)


@pytest.fixture
def stop(monkeypatch):
    """Sends a signal to this process when a step ends: `stop(after, number)` is the count of steps before it."""
    count = 0
    due = States.due

    def arm(after: int, number: int = signal.SIGTERM) -> None:
        nonlocal count
        count = 0

        def asked(self: States, step: int) -> bool:
            nonlocal count
            count += 1
            if count == after:
                signal.raise_signal(number)
            return due(self, step)

        monkeypatch.setattr(States, "due", asked)

    yield arm
    monkeypatch.setattr(States, "due", due)


def visible(folder):
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def hidden(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]


def latents(folder):
    return {path.name: load_latents(path)[0] for path in sorted(Path(folder).glob("*.latents.safetensors"))}


def check_equal(got, want, tolerance=1e-5):
    assert got.keys() == want.keys() and want
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=0, atol=tolerance * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize(
    ("first", "second", "number", "code", "more"),
    [
        (EIGHT, ONE, signal.SIGTERM, 75, ()),
        pytest.param(ONE, FOUR, signal.SIGINT, 130, (), marks=pytest.mark.slow),
        pytest.param(FOUR, EIGHT, signal.SIGTERM, 75, (), marks=pytest.mark.slow),
        pytest.param(TWO_BY_FOUR, ONE, signal.SIGTERM, 75, WINDOWS, marks=pytest.mark.slow),
    ],
)
def test_another_mesh_goes_on_where_the_first_one_stopped(tmp_path, stop, capsys, first, second, number, code, more):
    assert cli.command(words(tmp_path / "whole", *ONE, *more)) == 0
    stop(3, number)
    assert cli.command(words(tmp_path / "out", *first, *more)) == code
    assert f"{number.name}: stopped after step 3 of {STEPS}, whose state is saved" in capsys.readouterr().err
    assert visible(tmp_path / "out" / "r") == []
    stop(100)
    assert cli.command(words(tmp_path / "out", *second, *more)) == 0
    assert f"resuming at step 4 of {STEPS}" in capsys.readouterr().err
    # Of windows 1.7e-5 was measured at 6 of 1152 values, on 21 frames.
    check_equal(latents(tmp_path / "out" / "r"), latents(tmp_path / "whole" / "r"), 3e-5 if more else 1e-5)
    assert visible(tmp_path / "out" / "r") == visible(tmp_path / "whole" / "r")
    assert hidden(tmp_path / "out" / "r") == []


TWO = ("attention=ulysses", "ulysses_shards=2", "ici_data_parallelism=-1", "ici_context_parallelism=2")
# Cache, the step, from 1, after which the run is stopped: the next one is reused, and other keys.
CACHES = [
    ("mag", 6, ("cache_ratios={}/ratios.json",)),
    ("taylor", 6, ()),
    ("sea", 5, ("cache_threshold=0.6",)),
    ("first_block", 5, ("cache_threshold=0.6",)),
    ("spectrum", 7, ()),
]


def computed(folder):
    (record,) = (json.loads(path.read_text()) for path in Path(folder).glob("*.json"))
    return record["cache"]["computed"]


@pytest.mark.parametrize(
    ("cache", "after", "more", "first", "second"),
    [
        pytest.param(*CACHES[0], ONE, ONE, marks=pytest.mark.slow),
        pytest.param(*CACHES[1], ONE, ONE, marks=pytest.mark.slow),
        pytest.param(*CACHES[2], ONE, (*ONE, "loop=scan", "guidance_mode=two_pass"), marks=pytest.mark.slow),
        pytest.param(*CACHES[3], ONE, ONE, marks=pytest.mark.slow),
        pytest.param(*CACHES[4], TWO, ONE, marks=pytest.mark.slow),
        pytest.param(*CACHES[2], EIGHT, TWO, marks=pytest.mark.slow),
        pytest.param("sea", 5, (*CACHES[2][2], *WINDOWS), TWO_BY_FOUR, ONE, marks=pytest.mark.slow),
    ],
)
def test_a_step_cache_goes_on_too(tmp_path, stop, capsys, cache, after, more, first, second):
    (tmp_path / "ratios.json").write_text(json.dumps({"ratios": [1.0] + 11 * [0.99]}))
    more = ("num_inference_steps=12", f"cache={cache}", *(word.format(tmp_path) for word in more))
    assert cli.command(words(tmp_path / "whole", *ONE, *more)) == 0
    stop(after)
    assert cli.command(words(tmp_path / "out", *first, *more)) == 75
    stop(100)
    assert cli.command(words(tmp_path / "out", *second, *more)) == 0
    assert f"resuming at step {after + 1} of 12" in (said := capsys.readouterr().err) and "starts anew" not in said
    steps = computed(tmp_path / "whole" / "r")
    assert after + 1 not in steps[0]["prompt"], "the state of the cache is needed"
    assert computed(tmp_path / "out" / "r") == steps
    check_equal(
        latents(tmp_path / "out" / "r"), latents(tmp_path / "whole" / "r"), 3e-5 if WINDOWS[0] in more else 1e-5
    )


@pytest.mark.parametrize(
    ("after", "first", "second", "more"),
    [
        pytest.param(5, EIGHT, TWO, (), marks=pytest.mark.slow),
        pytest.param(3, ONE, EIGHT, ("cache=spectrum", "cache_first_steps=2"), marks=pytest.mark.slow),
        pytest.param(8, TWO, ONE, ("cache=taylor", "loop=scan", "checkpoint_steps=4"), marks=pytest.mark.slow),
    ],
)
def test_a_run_of_two_sizes_goes_on(tmp_path, stop, capsys, after, first, second, more):
    """Stopped before, at and after the change of size."""
    more = ("size=64*32", "num_inference_steps=12", "low_resolution_steps=5", *more)
    assert cli.command(words(tmp_path / "whole", *ONE, *more)) == 0
    stop(after if "loop=scan" not in more else 3)  # of a scan calls are counted, of 4, 1 and 4 steps
    assert cli.command(words(tmp_path / "out", *first, *more)) == 75
    assert f"stopped after step {after if 'loop=scan' not in more else 9} of 12" in capsys.readouterr().err
    stop(100)
    assert cli.command(words(tmp_path / "out", *second, *more)) == 0
    check_equal(latents(tmp_path / "out" / "r"), latents(tmp_path / "whole" / "r"))
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out" / "r").glob("*.json"))
    assert record["low_resolution_steps"] == 5
    assert hidden(tmp_path / "out" / "r") == []


@pytest.mark.slow
def test_a_state_without_that_of_the_cache_starts_it_anew(tmp_path, stop, monkeypatch, capsys):
    """As earlier versions wrote it."""
    save = States.save

    def old(self, videos, at, solver, done, cache):
        save(self, videos, dataclasses.replace(at, cache=""), solver, done)

    monkeypatch.setattr(States, "save", old)
    more = (*ONE, "num_inference_steps=12", "cache=taylor")
    stop(6)
    assert cli.command(words(tmp_path / "out", *more)) == 75
    stop(100)
    assert cli.command(words(tmp_path / "out", *more)) == 0
    assert "cache=taylor starts anew: step 7 is computed" in capsys.readouterr().err
    assert computed(tmp_path / "out" / "r")[0]["prompt"] == [7, 10]


def test_no_state_of_the_cache_is_kept_where_the_next_step_is_computed(tmp_path, monkeypatch):
    kept, save = {}, States.save

    def noted(self, videos, at, solver, done, cache):
        kept[at.step + 1] = at.cache
        assert (at.cache == "state") == (len(cache) > 1)
        save(self, videos, at, solver, done, cache)

    monkeypatch.setattr(States, "save", noted)
    (tmp_path / "ratios.json").write_text(json.dumps({"ratios": [1.0] + 11 * [0.99]}))
    more = ("num_inference_steps=12", "checkpoint_steps=1", "cache=mag", f"cache_ratios={tmp_path}/ratios.json")
    assert cli.command(words(tmp_path / "out", *ONE, *more)) == 0
    steps = computed(tmp_path / "out" / "r")[0]["prompt"]
    assert kept == {step: "log" if step in steps else "state" for step in range(2, 13)}


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_every_solver_keeps_its_history(tmp_path, stop, solver):
    more = (f"solver={solver}", *ONE)
    assert cli.command(words(tmp_path / "whole", *more)) == 0
    stop(4)
    assert cli.command(words(tmp_path / "out", *more)) == 75
    stop(100)
    assert cli.command(words(tmp_path / "out", *more)) == 0
    check_equal(latents(tmp_path / "out" / "r"), latents(tmp_path / "whole" / "r"))


@pytest.mark.slow
def test_a_scan_stops_between_two_calls_and_goes_on_step_by_step_or_by_other_calls(tmp_path, stop, capsys):
    assert cli.command(words(tmp_path / "whole", *ONE)) == 0
    stop(1)
    assert cli.command(words(tmp_path / "out", *ONE, "loop=scan", "checkpoint_steps=3")) == 75
    assert "stopped after step 3" in capsys.readouterr().err
    stop(1)
    assert cli.command(words(tmp_path / "out", *ONE, "loop=scan", "checkpoint_steps=2")) == 75
    assert "stopped after step 5" in capsys.readouterr().err
    stop(100)
    assert cli.command(words(tmp_path / "out", *ONE)) == 0
    assert f"resuming at step 6 of {STEPS}" in capsys.readouterr().err
    check_equal(latents(tmp_path / "out" / "r"), latents(tmp_path / "whole" / "r"))


@pytest.mark.slow
def test_a_scan_without_checkpoint_steps_stops_between_calls_too(tmp_path, stop, monkeypatch, capsys):
    assert cli.command(words(tmp_path / "whole", *ONE)) == 0
    monkeypatch.setattr(programs, "SCANNED", 3)
    stop(2, signal.SIGINT)
    assert cli.command(words(tmp_path / "out", *ONE, "loop=scan")) == 130
    assert "stopped after step 6" in capsys.readouterr().err
    stop(100)
    assert cli.command(words(tmp_path / "out", *ONE, "loop=scan")) == 0
    assert f"resuming at step 7 of {STEPS}" in capsys.readouterr().err
    check_equal(latents(tmp_path / "out" / "r"), latents(tmp_path / "whole" / "r"))


@pytest.mark.slow
def test_a_drawn_seed_goes_on_and_the_next_run_draws_anew(tmp_path, stop, capsys):
    command = words(tmp_path / "out", *ONE, "seed=-1")
    folder = tmp_path / "out" / "r"
    stop(3)
    assert cli.command(command) == 75
    assert sorted(Path(name).suffix for name in hidden(folder)) == [".draw", ".state"]
    stop(100)
    assert cli.command(command) == 0
    said = capsys.readouterr().err
    assert "goes on with the seeds" in said and f"resuming at step 4 of {STEPS}" in said
    assert hidden(folder) == []
    ((name, resumed),) = latents(folder).items()
    seed = json.loads((folder / name.replace(".latents.safetensors", ".json")).read_text())["seed"]
    assert cli.command(words(tmp_path / "whole", *ONE, f"seed={seed}")) == 0
    check_equal({name: resumed}, latents(tmp_path / "whole" / "r"))
    assert cli.command(command) == 0
    assert len(latents(folder)) == 2


@pytest.mark.slow
def test_the_last_two_states_are_kept_and_a_damaged_one_is_passed_over(tmp_path, stop, capsys):
    assert cli.command(words(tmp_path / "whole", *ONE)) == 0
    stop(6)
    assert cli.command(words(tmp_path / "out", *ONE, "checkpoint_steps=2")) == 75
    (folder,) = (tmp_path / "out" / "r").glob(".*.state")
    assert sorted(os.listdir(folder)) == ["4", "6"]
    for file in (folder / "6" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 0xFF
            file.write_bytes(data)
    stop(100)
    assert cli.command(words(tmp_path / "out", *ONE)) == 0
    said = capsys.readouterr().err
    assert "6 is damaged" in said and f"resuming at step 5 of {STEPS}" in said
    check_equal(latents(tmp_path / "out" / "r"), latents(tmp_path / "whole" / "r"))


@pytest.mark.slow
@pytest.mark.parametrize("other", ["seed=5", "guidance_scale=3", "prompt=a white square", "num_inference_steps=9"])
def test_the_state_of_another_run_is_not_taken(tmp_path, stop, capsys, other):
    stop(3)
    assert cli.command(words(tmp_path / "out", *ONE)) == 75
    stop(100)
    others = [word for word in words(tmp_path / "out", *ONE) if word.partition("=")[0] != other.partition("=")[0]]
    assert cli.command([*others, other]) == 0
    assert "resuming" not in capsys.readouterr().err
    assert len(hidden(tmp_path / "out" / "r")) == 1  # the first run's state, for that command


@pytest.mark.slow
def test_without_states_a_signal_still_ends_the_run(tmp_path, stop, capsys):
    stop(3)
    assert cli.command(words(tmp_path / "out", *ONE, "checkpoint_steps=0")) == 75
    assert "whose state is saved" not in capsys.readouterr().err
    assert not (tmp_path / "out" / "r").exists() or hidden(tmp_path / "out" / "r") == []


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_whole_latents_are_decoded_and_not_denoised_again(tmp_path, monkeypatch, capsys, named):
    from maxdiffusion.media import frames

    more = (f"save_file={tmp_path}/out/r/clip.mp4",) if named else ()
    in_bytes = frames.in_bytes
    monkeypatch.setattr(frames, "in_bytes", lambda *args: signal.raise_signal(signal.SIGTERM))
    assert cli.command(words(tmp_path / "out", *ONE, *more)) == 75
    assert len(visible(tmp_path / "out" / "r")) == 1
    monkeypatch.setattr(frames, "in_bytes", in_bytes)
    capsys.readouterr()
    assert cli.command(words(tmp_path / "out", *ONE, *more)) == 0
    said = capsys.readouterr().err
    assert "holds the latents of an earlier run" in said and "denoise" not in said
    assert len(visible(tmp_path / "out" / "r")) == 4 and hidden(tmp_path / "out" / "r") == []


@pytest.mark.slow
def test_a_prompt_file_goes_on_within_a_line(tmp_path, stop, capsys):
    lines = [{"seed": seed, "output": f"v{seed}"} for seed in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = (*EIGHT, f"prompts={tmp_path}/p.jsonl")
    assert cli.command(words(tmp_path / "whole", *more)) == 0
    stop(STEPS + 2)  # a step of the second line: the last step of a line asks nothing
    assert cli.command(words(tmp_path / "out", *more)) == 75
    assert [name for name in visible(tmp_path / "out" / "r") if name.endswith(".mp4")] == ["v0.mp4"]
    stop(100)
    capsys.readouterr()
    assert cli.command(words(tmp_path / "out", *more)) == 0
    said = capsys.readouterr().err
    assert "1 of 3 videos" in said and f"resuming at step 4 of {STEPS}" in said
    check_equal(latents(tmp_path / "out" / "r"), latents(tmp_path / "whole" / "r"))
    assert hidden(tmp_path / "out" / "r") == []


@pytest.mark.slow
def test_rows_of_one_batch_go_on_in_others(tmp_path, stop):
    """Three videos in one batch, then one by one and on another mesh."""
    more = ("seed=[1,2,3]",)
    assert cli.command(words(tmp_path / "whole", *more, *ONE)) == 0
    stop(3)
    assert cli.command(words(tmp_path / "out", *more, *ONE, "per_device_batch_size=3")) == 75
    assert len(hidden(tmp_path / "out" / "r")) == 3
    stop(100)
    assert cli.command(words(tmp_path / "out", *more, *FOUR, "per_device_batch_size=1")) == 0
    check_equal(latents(tmp_path / "out" / "r"), latents(tmp_path / "whole" / "r"))
    assert hidden(tmp_path / "out" / "r") == []


@pytest.mark.slow
def test_a_bucket_keeps_states(tmp_path, stop, bucket: type[Bucket], capsys):
    assert cli.command(words(tmp_path / "whole", *ONE)) == 0
    stop(3)
    assert cli.command(words("gs://b/out", *ONE)) == 75
    stop(100)
    capsys.readouterr()
    assert cli.command(words("gs://b/out", *ONE)) == 0
    assert f"resuming at step 4 of {STEPS}" in capsys.readouterr().err
    check_equal(latents(bucket.root / "b" / "out" / "r"), latents(tmp_path / "whole" / "r"))
    assert [path for path in (bucket.root / "b").rglob("*") if path.is_file() and ".state" in str(path)] == []


@pytest.fixture(scope="module")
def two_experts(random_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoint"
    shutil.copytree(random_checkpoint, folder)
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    (file,) = (folder / "transformer_2").glob("*.safetensors")
    save_file({name: tensor * np.asarray(1.05, tensor.dtype) for name, tensor in load_file(file).items()}, file)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.8}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


SIZES = ("width=64", "num_inference_steps=12", "low_resolution_steps=4", "cache=sea", "cache_threshold=0.6")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("residency", "after", "keys"),
    [
        *((residency, after, ()) for residency in ("together", "in_turn") for after in (2, 5, 9)),
        ("in_turn", 3, SIZES),
        ("together", 9, SIZES),
        ("in_turn", 14, (*SIZES[:2], "low_resolution_steps=8", *SIZES[3:])),
    ],
)
def test_two_experts(two_experts, tmp_path, stop, capsys, residency, after, keys):
    """Two batches, stopped in the high-noise and in the low-noise steps of one of them."""
    (tmp_path / "run.yml").write_text("model_name: wan2.2-t2v\n")
    more = [f"pretrained_model_name_or_path={two_experts}", "seed=[1,2]", "prompt=a cat", "height=32", *keys]
    more += [word for word in ("width=48", f"num_inference_steps={STEPS}") if not _given(word, keys)]
    more += ["num_frames=5", "flow_shift=3", "run_name=r", "jax_cache_dir=", *EIGHT]
    more += [f"expert_residency={residency}", "weights_dtype=float32", "activations_dtype=float32"]
    command = [str(tmp_path / "run.yml"), *more]
    assert cli.command([*command, f"output_dir={tmp_path}/whole"]) == 0
    stop(after)
    assert cli.command([*command, "checkpoint_steps=1", f"output_dir={tmp_path}/out"]) == 75
    stop(100)
    assert cli.command([*command, "checkpoint_steps=1", f"output_dir={tmp_path}/out"]) == 0
    check_equal(latents(tmp_path / "out" / "r"), latents(tmp_path / "whole" / "r"))
    assert hidden(tmp_path / "out" / "r") == []
    assert "cannot be saved" not in capsys.readouterr().err  # nor one state twice, at the end of an expert
