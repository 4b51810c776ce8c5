"""`cache_psnr`: a threshold is found before the run, by one program, and a run that was stopped goes on with it."""

from __future__ import annotations

import json
import re
import signal

import numpy as np
import pytest

from maxdiffusion import cli
from maxdiffusion.denoise.loop import Denoiser
from maxdiffusion.output.states import States
from maxdiffusion.weights.latents_io import load_latents
from tests.support.videos import CONFIGS

WORDS = [str(CONFIGS / "wan_tiny.yml"), "prompt=a red circle", "size=48*32", "num_frames=5", "num_inference_steps=12"]
WORDS += ["run_name=r", "jax_cache_dir=", "cache=first_block", "cache_psnr=30", "contact_sheet=0"]


def result(folder):
    (latents,), (record,) = folder.glob("*.latents.safetensors"), folder.glob("*.json")
    return load_latents(latents)[0], json.loads(record.read_text())["cache"]


@pytest.mark.slow
def test_a_threshold_is_found_once(tmp_path, monkeypatch, capsys):
    compiled, compile_all = [], Denoiser.compile
    monkeypatch.setattr(Denoiser, "compile", lambda self, *args: compiled.append(self) or compile_all(self, *args))
    assert cli.command([*WORDS, f"output_dir={tmp_path}/whole"]) == 0
    assert len(compiled) == 1
    pattern = r"cache_threshold=(\S+) keeps (\S+) dB and computes (\d+) of the first 11 steps"
    trials = [tuple(map(float, found)) for found in re.findall(pattern, capsys.readouterr().err)]
    assert len(trials) == 6 and trials[0][0] == 0.05
    latents, cache = result(tmp_path / "whole" / "r")
    assert cache["threshold"] == max(threshold for threshold, psnr, _ in trials if psnr >= 30)
    assert any(psnr < 30 for _, psnr, _ in trials), "the search is bounded on both sides"
    (count,) = {count for threshold, _, count in trials if threshold == cache["threshold"]}
    assert sum(step <= 11 for step in cache["computed"][0]["prompt"]) == count < 11

    asked, due = iter(range(1, 100)), States.due

    def stop(self, step):
        if next(asked) == 4:
            signal.raise_signal(signal.SIGTERM)
        return due(self, step)

    monkeypatch.setattr(States, "due", stop)
    assert cli.command([*WORDS, f"output_dir={tmp_path}/out"]) == 75
    folder = tmp_path / "out" / "r"
    assert sorted(path.suffix for path in folder.iterdir()) == [".state", ".threshold"]
    capsys.readouterr()
    assert cli.command([*WORDS, f"output_dir={tmp_path}/out"]) == 0
    said = capsys.readouterr().err
    assert f"cache_threshold={cache['threshold']:g}, as a run of this command found it" in said and "keeps" not in said
    again, found = result(folder)
    assert found == cache and not list(folder.glob(".*"))
    np.testing.assert_allclose(again, latents, atol=1e-5 * np.abs(latents).max())


@pytest.mark.slow
def test_where_no_threshold_keeps_it_every_step_is_computed(tmp_path, capsys):
    """Ratios so near 1 that steps are left out by any threshold."""
    (tmp_path / "ratios.json").write_text(json.dumps({"ratios": [1.0] + 11 * [0.9999]}))
    words = [word for word in WORDS if not word.startswith("cache")]
    words += ["cache=mag", f"cache_ratios={tmp_path}/ratios.json", "cache_psnr=99", f"output_dir={tmp_path}"]
    assert cli.command(words) == 0
    assert "no cache_threshold down to 0.0" in capsys.readouterr().err
    _, cache = result(tmp_path / "r")
    assert cache["threshold"] is None and cache["computed"][0]["prompt"] == [*range(1, 13)]
