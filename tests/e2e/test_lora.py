"""Whole runs with LoRA: the same video on a mesh, one per expert, and nothing loaded where a file is wrong."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

from maxdiffusion import cli
from maxdiffusion.weights.nets import Nets
from tests.support import lora
from tests.support.videos import CONFIGS, ROOT, made, psnr

STEPS = "num_inference_steps=4"
ONE = ("attention=dot_product", "ici_data_parallelism=-1", "ici_context_parallelism=1")
MESH = ("attention=ulysses_ring", "ulysses_shards=2", "ici_fsdp_parallelism=2", "ici_context_parallelism=4")


def write(path: Path, model: Path, layers: int, size: float = 0.1) -> Path:
    """A LoRA of all linear layers, with an int64 alpha and changes of biases and modulations."""
    with safe_open(model / "transformer" / "diffusion_pytorch_model.safetensors", "numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    modules, rng = lora.modules(layers), np.random.default_rng(1)
    made = lora.factors(shapes, [ours for ours, _ in modules])
    tensors = {}
    for ours, theirs in modules:
        for part, factor in zip(("lora_down", "lora_up"), made[ours], strict=True):
            tensors[f"diffusion_model.{theirs}.{part}.weight"] = size**0.5 * factor
        tensors[f"diffusion_model.{theirs}.alpha"] = np.array(8, np.int64)
    for i in range(layers):
        change = size * rng.normal(size=shapes[f"blocks.{i}.scale_shift_table"])
        tensors[f"diffusion_model.blocks.{i}.diff_m"] = change.astype("f4")
        change = size * rng.normal(size=shapes[f"blocks.{i}.attn1.to_q.bias"])
        tensors[f"diffusion_model.blocks.{i}.self_attn.q.diff_b"] = change.astype("f4")
    return lora.write(path, tensors)


@pytest.mark.slow
def test_the_same_video_on_a_mesh(tmp_path):
    """Fsdp 2 x ring 2 x Ulysses 2 on eight devices: each reads and merges the rows that it holds."""
    assert len(jax.devices()) == 8
    file = write(tmp_path / "a.safetensors", ROOT / "models" / "wan_tiny", 6)
    without = made(tmp_path / "0", STEPS, *ONE)[0]
    one = made(tmp_path / "1", STEPS, *ONE, f"lora={file}")[0]
    mesh = made(tmp_path / "8", STEPS, *MESH, f"lora={file}")[0]
    figure = psnr(mesh, one)
    print(f"fsdp 2, ring 2, Ulysses 2 with LoRA: {figure:.1f} dB; without LoRA: {psnr(without, one):.1f} dB")
    assert figure > 60 and psnr(without, one) < 40


@pytest.fixture
def experts(tmp_path) -> Path:
    """A tiny random checkpoint of two experts, each with its own numbers."""
    script = runpy.run_path(str(ROOT / "scripts" / "make_random_checkpoint.py"))
    nets = ["text_encoder", "transformer", "transformer_2", "vae"]
    script["main"]([str(tmp_path / "two"), "--preset", "tiny", "--nets", *nets])
    return tmp_path / "two"


@pytest.mark.slow
def test_each_expert_has_its_own(tmp_path, experts):
    file = write(tmp_path / "a.safetensors", experts, 2)
    words = (f"pretrained_model_name_or_path={experts}", "size=64*64", "num_frames=5", STEPS, *ONE)
    words += ("model_name=wan2.2-t2v", "prompt=a", "weights_dtype=float32", "activations_dtype=float32")

    def video(name, *more):
        return made(tmp_path / name, *words, *more, page="wan2.2_t2v_a14b")[0]

    videos = [
        video("none"),
        video("high", f"lora={file}"),
        video("low", f"lora_2={file}"),
        video("both", f"lora={file}", f"lora_2={{{file}: -1}}"),
    ]
    for i, a in enumerate(videos):
        assert all(not np.array_equal(a, b) for b in videos[:i])
    undone = tmp_path / "b.safetensors"
    undone.write_bytes(file.read_bytes())
    assert psnr(video("undone", f"lora_2={{{file}: 1, {undone}: -1}}"), videos[0]) > 60


@pytest.mark.parametrize("damage", ["NaN", "another model's", "truncated"])
def test_nothing_is_loaded_where_a_file_is_wrong(tmp_path, capsys, monkeypatch, damage):
    file = write(tmp_path / "a.safetensors", ROOT / "models" / "wan_tiny", 6)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "NaN":
        file.write_bytes(file.read_bytes()[:-4] + np.float32("nan").tobytes())
    else:
        lora.write(file, {f"blocks.0.self_attn.q.lora_{part}": np.ones((64, 64), np.float32) for part in "AB"})

    def load(*args):
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(Nets, "load", load)
    out = tmp_path / "out"
    words = [str(CONFIGS / "wan_tiny.yml"), f"lora={file}", f"output_dir={out}", "jax_cache_dir=", "log_level=error"]
    assert cli.command(words) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said and str(file) in said
    assert not out.exists()
