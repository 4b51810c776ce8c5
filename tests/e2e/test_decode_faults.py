"""A decode that fails loses nothing: it is tried again by smaller chunks, and else says where the latents are."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from maxdiffusion import cli
from maxdiffusion.denoise.loop import Program
from maxdiffusion.media.read import read_video
from maxdiffusion.models.vae import model
from maxdiffusion.runtime import distributed

ROOT = Path(__file__).parents[2]
FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 2583807080 bytes.\nmore lines"


def words(out, *more, fmt="npy"):
    return [
        str(ROOT / "configs" / "wan_tiny.yml"),
        f"pretrained_model_name_or_path={ROOT / 'models' / 'wan_tiny'}",
        *("size=48*32", "num_frames=9", "num_inference_steps=2", "guidance_scale=1"),
        "attention=dot_product",
        *(f"output_dir={out}", "run_name=r", f"output_format={fmt}", f"jax_cache_dir={Path(out).parent}/xla", *more),
    ]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The runs' devices: replicas on the others would take eight times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture
def memory_for(monkeypatch):
    """A device whose memory suffices for calls of the VAE of at most so many latent frames; and a signal in a call."""
    program = model.program

    def limit(frames: int, stopped_before: int = 0) -> None:
        calls = 0

        def limited(later=False):
            run = program(later)

            def checked(graph, state, name, cache, x):
                nonlocal calls
                if x.shape[1] > frames:
                    raise jax.errors.JaxRuntimeError(FULL)
                calls += 1
                if calls == stopped_before:
                    signal.raise_signal(signal.SIGTERM)
                return run(graph, state, name, cache, x)

            return checked

        monkeypatch.setattr(model, "program", limited)

    yield limit
    monkeypatch.setattr(model, "program", program)


def only(folder, pattern):
    (path,) = Path(folder).glob(pattern)
    return path


@pytest.fixture(scope="module")
def plain(one_device, tmp_path_factory):
    """The frames of a run without faults, and its latents' file."""
    out = tmp_path_factory.mktemp("plain")
    assert cli.command(words(out)) == 0
    return np.load(only(out / "r", "*.npy")), only(out / "r", "*.latents.safetensors")


@pytest.mark.slow
def test_a_decode_without_memory_is_tried_again_by_smaller_chunks(plain, tmp_path, capsys, memory_for):
    memory_for(1)
    assert cli.command(words(tmp_path)) == 0
    assert capsys.readouterr().err.count("out of device memory in a call that decodes 3 latent frames; tried") == 1
    got = np.load(only(tmp_path / "r", "*.npy"))
    assert got.shape == plain[0].shape
    assert np.abs(got.astype(int) - plain[0]).max() <= 1


@pytest.mark.slow
def test_one_that_never_fits_says_where_the_latents_are_and_what_fits(plain, tmp_path, capsys, memory_for):
    memory_for(0)
    assert cli.command(words(tmp_path)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    latents = only(tmp_path / "r", "*.latents.safetensors")
    assert error.startswith("error: out of device memory in decode (Out of memory allocating 2.41 GiB)")
    assert f"the latents are kept in {latents}, and decode_latents=PATH decodes them" in error
    assert "vae_dtype=bfloat16" in error and "more devices" in error
    memory_for(3)
    assert cli.command(words(tmp_path / "b", f"decode_latents={latents}")) == 0
    assert (np.load(only(tmp_path / "b" / "r", "*.npy")) == plain[0]).all()


@pytest.mark.slow
def test_a_denoise_without_memory_is_one_sentence_with_its_last_state(tmp_path, capsys, monkeypatch):
    advance = Program.advance

    def full(self, params, contexts, state, expert, on_step):
        def after(i, n, state):
            on_step(i, n, state)
            raise jax.errors.JaxRuntimeError(FULL)

        return advance(self, params, contexts, state, expert, after)

    monkeypatch.setattr(Program, "advance", full)
    assert cli.command(words(tmp_path, "checkpoint_steps=1", "activations_dtype=float32")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of device memory in denoise (Out of memory")
    assert "the state after step 1 is saved, and the same command goes on from it" in error
    assert "activations_dtype=bfloat16, more devices, a smaller size or num_frames (plan=here" in error


def test_a_signal_in_decode_says_where_the_latents_are(tmp_path, capsys, memory_for):
    memory_for(3, stopped_before=1)
    assert cli.command(words(tmp_path)) == 75
    error = capsys.readouterr().err.splitlines()[-1]
    latents = only(tmp_path / "r", "*.latents.safetensors")
    assert error == f"SIGTERM: stopped, the latents are kept in {latents}; the same command goes on from there"


@pytest.mark.slow
def test_a_folder_of_frames_goes_on_from_the_first_that_is_not_there(plain, tmp_path, capsys, memory_for):
    latents, out = plain[1], tmp_path / "b"
    command = words(out, f"decode_latents={latents}", fmt="png")
    memory_for(1, stopped_before=3)
    assert cli.command(command) == 75
    (partial,) = (out / "r").glob(".*.frames")
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.png")}
    assert len(before) == 5
    memory_for(3)
    assert cli.command(command) == 0
    assert "5 of 9 frames are there already" in capsys.readouterr().err
    folder = next(path for path in (out / "r").iterdir() if path.is_dir())
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(after) == 9 and before.items() <= after.items()
    assert np.abs(read_video(folder).astype(int) - plain[0]).max() <= 1
    assert [path.name for path in (out / "r").iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_video_that_the_disk_cannot_take_says_where_the_latents_are(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # latents 9 kB, frames 41 kB
    try:
        assert cli.command(words(tmp_path, "checkpoint_steps=0")) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the file would be larger than" in error
    assert f"the latents are kept in {only(tmp_path / 'r', '*.latents.safetensors')}, and" in error
