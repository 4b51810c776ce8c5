"""Mistakes that only the checkpoint, the disk or a given file shows: one sentence, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from maxdiffusion import cli
from maxdiffusion.weights.headers import read_header
from maxdiffusion.weights.latents_io import load_latents, save_latents

ROOT = Path(__file__).parents[2]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE = {
    "no transformer weights": (lambda f: (f / "transformer" / WEIGHTS).unlink(), "transformer"),
    "truncated vae": (lambda f: truncate(f / "vae" / WEIGHTS), "truncated"),
    "truncated text encoder": (lambda f: truncate(f / "text_encoder" / "model.safetensors"), "truncated"),
    "a pointer in place of weights": (lambda f: (f / "vae" / WEIGHTS).write_text("version https://git-lfs"), "vae"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "vae"),
    "no model_index.json": (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
    "another pipeline": (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
    "broken json": (lambda f: (f / "vae" / "config.json").write_text("{"), "config.json"),
    "another size than the weights": (lambda f: edit(f / "vae" / "config.json", base_dim=24), "encoder"),
    "a vae of 2.2": (lambda f: edit(f / "vae" / "config.json", is_residual=True), "do not"),
    "another variant": (lambda f: edit(f / "transformer" / "config.json", num_layers=30), "wan-tiny-t2v"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
}


def run(tmp_path, capsys, *words) -> str:
    """The sentence of a run that must fail."""
    config = str(ROOT / "configs" / "wan_tiny.yml")
    out = tmp_path / "out"
    code = cli.command([config, f"output_dir={out}", "jax_cache_dir=", "log_level=error", *words])
    said = capsys.readouterr().err.strip()
    assert code == 2
    assert not [path for path in out.rglob("*") if path.is_file()]
    assert said.startswith("error: ") and "Traceback" not in said
    return said


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_checkpoint(bundled, tmp_path, capsys, what):
    folder = Path(shutil.copytree(bundled, tmp_path / "checkpoint"))
    damage, named = DAMAGE[what]
    damage(folder)
    said = run(tmp_path, capsys, f"pretrained_model_name_or_path={folder}")
    assert named in said
    assert "\n" not in said or what == "another size than the weights"  # that one lists every tensor


@pytest.mark.parametrize("key", ["initial_latents", "decode_latents"])
@pytest.mark.parametrize("shape", [(1, 5, 12, 12, 16), (1, 3, 12, 12, 8), (0, 5, 12, 12, 8)])
def test_latents_of_another_size(tmp_path, capsys, key, shape):
    path = tmp_path / "given.safetensors"
    save_latents(path, np.zeros(shape, np.float32), {})
    assert str(path) in run(tmp_path, capsys, f"{key}={path}")


SMALL = ("height=32", "width=32", "num_frames=1", "num_inference_steps=9", "guidance_scale=1", "ici_data_parallelism=1")


@pytest.mark.parametrize(
    ("file", "tensor", "words", "named"),
    [
        (f"transformer/{WEIGHTS}", "proj_out.bias", [], "the weights of transformer have "),
        pytest.param(
            *(f"transformer/{WEIGHTS}", "proj_out.bias", ["loop=scan"], "the weights of transformer have "),
            marks=pytest.mark.slow,
        ),
        (
            "text_encoder/model.safetensors",
            "final_layer_norm.weight",
            ["text_encoder_dtype=bfloat16"],
            "the text embedding",
        ),
    ],
)
def test_nan_is_noticed_before_anything_is_saved(bundled, tmp_path, capsys, file, tensor, words, named):
    folder = Path(shutil.copytree(bundled, tmp_path / "checkpoint"))
    header, _ = read_header(folder / file)
    (place,) = (each for name, each in header.items() if name.endswith(tensor))
    with open(folder / file, "r+b") as weights:
        weights.seek(place.start)
        weights.write(b"\xff" * 4)  # NaN in fp32, bf16 and fp16
    said = run(tmp_path, capsys, f"pretrained_model_name_or_path={folder}", *SMALL, *words)
    assert named in said and "NaN" in said
    assert ("try text_encoder_dtype=float32" in said) == file.startswith("text")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_an_overflow_names_the_step_and_what_to_try(tmp_path, capsys, dtype):
    latents = np.full((1, 1, 4, 4, 8), 3e38, np.float32)  # finite; its square is not
    save_latents(tmp_path / "given.safetensors", latents, {})
    said = run(tmp_path, capsys, *SMALL, f"initial_latents={tmp_path}/given.safetensors", f"activations_dtype={dtype}")
    assert "step 1 of 9 (transformer) left " in said and "not saved" in said
    assert ("try activations_dtype=float32" in said) == (dtype == "bfloat16")
    assert ("activations_dtype is float32 already" in said) == (dtype == "float32")


@pytest.mark.parametrize("key", ["initial_latents", "decode_latents"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_given_latents_that_are_not_numbers(tmp_path, capsys, key, value):
    latents = np.zeros((1, 1, 4, 4, 8), np.float32)
    latents[0, 0, 1, 2, :3] = float(value)
    save_latents(tmp_path / "given.safetensors", latents, {})
    said = run(tmp_path, capsys, *SMALL, f"{key}={tmp_path}/given.safetensors")
    assert "given.safetensors holds 3 NaN or infinite values of 128" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["ici_data_parallelism=3", "ici_context_parallelism=5"], "parallelism"),
        (["attention=flash"], "attention=flash"),
        (["logical_axis_rules=[[nose, data]]"], "nose"),
        (["ulysses_shards=3", "attention=ulysses_ring", "ici_context_parallelism=1"], "ulysses_shards=3"),
    ],
)
def test_devices_that_do_not_fit(tmp_path, capsys, words, named):
    assert named in run(tmp_path, capsys, *words)


@pytest.mark.slow
def test_decode_latents_makes_the_same_video(bundled, tmp_path):
    config = str(ROOT / "configs" / "wan_tiny.yml")
    # One mesh for both: a video that is only decoded would leave the data axis of the guidance pair to the width.
    words = (
        "num_inference_steps=2",
        "output_format=npy",
        "ici_data_parallelism=1",
        "log_level=error",
        "jax_cache_dir=",
    )
    common = [config, *words]
    assert cli.command([*common, f"save_file={tmp_path / 'a.npy'}"]) == 0
    latents = tmp_path / "other.safetensors"
    save_latents(
        latents, load_latents(tmp_path / "a.latents.safetensors")[0], {"seed": "9" * 5000}
    )  # no number of ours
    assert cli.command([*common, f"decode_latents={latents}", f"save_file={tmp_path / 'b.npy'}"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["seed"] == 0 and record["config"]["num_inference_steps"] == 2
    assert {"load", "text", "compile", "denoise", "decode", "encode"} <= set(record["timings"]["seconds"])
    assert len(record["timings"]["steps"]["denoise"]) == 2
