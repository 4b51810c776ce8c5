"""`verify=true` on eight virtual devices: passes where it should, and sees what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxdiffusion import request, verify
from maxdiffusion.attention import ring
from maxdiffusion.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "wan_tiny.yml")
WORDS = ("verify=true", "log_level=error", "jax_cache_dir=")
BFLOAT16 = ("weights_dtype=bfloat16", "activations_dtype=bfloat16")


def load(*words: str, steps: int = 2) -> request.Job:
    return request.load([CONFIG, *WORDS, f"verify_steps={steps}", *words])


def test_ring_and_ulysses_against_one_device(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = verify.run(load("attention=ulysses_ring", "ulysses_shards=2"))
    printed = capsys.readouterr().out
    print(printed)
    assert len(found) == 2 and all(100 < difference.psnr < float("inf") for difference in found)
    assert printed.startswith("against one device; at least 60 dB") and printed.count("\n") == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("split", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [(), BFLOAT16], ids=["float32", "bfloat16"])
def test_every_split_passes_at_its_tolerance(split, dtype):
    verify.run(load("attention=ulysses_ring", f"ulysses_shards={split}", *dtype, steps=4))


@pytest.mark.slow
def test_a_few_step_run_compares_the_first_of_its_levels():
    """Fresh noise between the steps is the same on both meshes."""
    few = ("solver=renoise", "sigmas=[1, 0.757, 0.522]", "guidance_scale=1", "attention=ring")
    found = verify.run(load(*few, steps=2))
    assert len(found) == 2 and all(difference.psnr > 100 for difference in found)


@pytest.mark.slow
def test_against_a_second_mesh_of_all_devices(capsys):
    verify.run(load("attention=ulysses", "ulysses_shards=8", "verify_against=[attention=ring, ulysses_shards=1]"))
    assert capsys.readouterr().out.startswith("against attention=ring ulysses_shards=1;")


@pytest.mark.slow
def test_a_wrong_merge_is_seen(monkeypatch):
    monkeypatch.setattr(ring, "merge", lambda out, lse, other_out, other_lse: (out, lse))
    with pytest.raises(UserError, match="differ by more than 60 dB allow from step 1 on"):
        verify.run(load("attention=ring", steps=1))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["verify_against=[seed=3]"], "seed is not a key of attention and parallelism"),
        (["verify_against=[ring]"], "not a list of key=value arguments"),
        (["verify_against=[attention=rung]"], "did you mean ring?"),
        (["verify_against=[atention=ring]"], "did you mean attention?"),
        (["verify_against=[ulysses_shards=3, attention=ulysses]"], "does not divide the 8 heads"),
    ],
)
def test_a_second_mesh_that_cannot_be_is_refused_at_load(words, expected):
    with pytest.raises(UserError) as error:
        load(*words)
    assert expected in str(error.value)


def test_one_device_is_not_compared_with_itself():
    code = "import sys; from maxdiffusion.cli import command; sys.exit(command(sys.argv[1:]))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", code, CONFIG, *WORDS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "compares with one device, and there is one here" in done.stderr
