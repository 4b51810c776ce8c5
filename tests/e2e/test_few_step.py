"""Few-step runs by the whole command: two distilled experts against diffusers, and renoise on meshes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from maxdiffusion import generate_wan, request
from maxdiffusion.weights.latents_io import save_latents
from tests.support.parity import relative_error
from tests.support.videos import CONFIGS, QUIET, psnr

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_random_checkpoint.py"))
PROMPT = "a green square moving left"
SIZE = 32
GATE = (("weight", 2), ("bias", 1))  # of FastWan's sparse attention


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a14b")
    SCRIPT["main"]([str(folder), "--preset", "tiny", "--nets", "text_encoder", "transformer", "transformer_2", "vae"])
    return folder


def words(folder, checkpoint, *more):
    (folder / "run.yml").write_text("# all keys are given as words\n")
    return [
        str(folder / "run.yml"),
        "model_name=wan2.2-t2v",
        f"pretrained_model_name_or_path={checkpoint}",
        f"prompt={PROMPT}",
        "negative_prompt=blurry",
        f"size={SIZE}*{SIZE}",
        "num_frames=9",
        *(f"{key}_dtype=float32" for key in ("weights", "activations", "text_encoder")),
        "output_format=npy",
        f"output_dir={folder}",
        "jax_cache_dir=",
        "log_level=error",
        *more,
    ]


@pytest.mark.parametrize(
    ("shift", "split", "boundary"),
    [
        pytest.param(5.0, ("boundary_ratio=0.875", "guidance_scale=1"), 0.875, marks=pytest.mark.slow),
        pytest.param(5.0, ("boundary_step=2", "guidance_scale=3", "guidance_scale_2=1"), 0.875, marks=pytest.mark.slow),
        pytest.param(16.0, ("boundary_step=2", "guidance_scale=1"), 0.95, marks=pytest.mark.slow),
    ],
    ids=["by ratio, unguided", "by number, the first guided", "between two images"],
)
def test_four_steps_of_two_distilled_experts(tmp_path, two_experts, shift, split, boundary):
    """Euler, two steps of each expert; the reference is given the boundary that lies there."""
    noise = np.random.default_rng(7).standard_normal((1, 3, SIZE // 8, SIZE // 8, 16), np.float32)
    save_latents(tmp_path / "noise.safetensors", noise, {})
    pipeline = diffusers.WanPipeline.from_pretrained(
        two_experts,
        dtype=torch.float32,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        transformer_2=diffusers.WanTransformer3DModel.from_pretrained(two_experts, subfolder="transformer_2"),
    )
    pipeline.register_to_config(boundary_ratio=boundary)
    pipeline.set_progress_bar_config(disable=True)
    set_timesteps = pipeline.scheduler.set_timesteps
    pipeline.scheduler.set_timesteps = lambda steps, device: set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], device=device)
    scale = 3.0 if "guidance_scale=3" in split else 1.0
    theirs = pipeline(
        PROMPT,
        negative_prompt="blurry",
        height=SIZE,
        width=SIZE,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=scale,
        guidance_scale_2=1.0,
        latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
        output_type="np",
    ).frames[0]
    theirs = np.round(theirs * 255).astype(np.uint8)
    recipe = ("solver=euler", "num_inference_steps=4", f"flow_shift={shift:g}", *split)
    given = words(tmp_path, two_experts, f"initial_latents={tmp_path / 'noise.safetensors'}", *recipe)
    ours = np.load(generate_wan.run(request.load(given))[0])
    assert theirs.std() > 5, "a flat video would compare equal to anything flat"
    figure = psnr(ours, theirs)
    print(f"shift {shift:g}, {' '.join(split)}: {figure:.1f} dB")
    assert ours.shape == theirs.shape and figure > 60


@pytest.mark.slow
def test_steps_and_shift_of_each_expert(tmp_path, two_experts):
    """Steps of the high-noise expert with guidance, then of the other without: step by step as in a scan."""
    keys = ("num_inference_steps=3", "flow_shift=12", "guidance_scale=3.5")
    keys += ("num_inference_steps_2=2", "flow_shift_2=5", "guidance_scale_2=1", "boundary_ratio=0.875")
    given = words(tmp_path, two_experts, *keys, "expert_residency=in_turn", "seed=[1, 2]")
    steps, scan = (generate_wan.run(request.load([*given, f"loop={loop}"])) for loop in ("steps", "scan"))
    for one, two in zip(steps, scan, strict=True):
        assert np.load(one).std() > 5 and psnr(np.load(one), np.load(two)) > 60


@pytest.mark.slow
def test_a_dmd_pipeline_is_run_as_it_asks(tmp_path, capfd):
    """As FastWan: the class in model_index.json, and gates of sparse attention that dense attention does not use."""
    folder = tmp_path / "fastwan"
    SCRIPT["main"]([str(folder), "--preset", "tiny"])
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    gates = {f"blocks.{i}.to_gate_compress.{name}": np.ones((24,) * n, np.float32) for i in (0, 1) for name, n in GATE}
    save_file(load_file(file) | gates, file)
    given = [word.replace("log_level=error", "log_level=info") for word in words(tmp_path, folder)]
    (video,) = generate_wan.run(request.load([word.replace("wan2.2-t2v", "wan2.1-t2v") for word in given]))
    assert np.load(video).std() > 5
    record = json.loads(video.with_suffix(".json").read_text())["config"]
    assert (record["solver"], record["sigmas"], record["guidance_scale"]) == ("renoise", [1.0, 0.757, 0.522], 1.0)
    log = capfd.readouterr().err
    assert f"solver: renoise  ({folder} is a WanDMDPipeline)" in log
    assert "the model does not use blocks.{0-1}.to_gate_compress." in log


RENOISE = ("solver=renoise", "sigmas=[1, 0.757, 0.522]", "guidance_scale=1", "size=48*48", "num_frames=5")
ONE = ("attention=dot_product", "ici_data_parallelism=-1", "ici_context_parallelism=1")
EIGHT = {
    "ring 2 x ulysses 4": ("attention=ulysses_ring", "ulysses_shards=4", "ici_context_parallelism=8", "loop=scan"),
    "data 2 x ring 4": ("ici_data_parallelism=2", "ici_context_parallelism=4", "attention=ring"),
}


def latents(folder, *more):
    """The latents of each video that the bundled model makes."""
    given = (str(CONFIGS / "wan_tiny.yml"), *QUIET, f"output_dir={folder}", *RENOISE, *more)
    paths = generate_wan.run(request.load(given))
    return [load_file(path.with_name(f"{path.stem}.latents.safetensors"))["latents"] for path in paths]


@pytest.mark.slow
def test_renoise_is_the_same_on_eight_devices_in_any_batch_and_in_a_scan(tmp_path):
    """The noise between steps follows from the seed and the step alone."""
    alone = [latents(tmp_path / f"{seed}", *ONE, f"seed={seed}")[0] for seed in (3, 4)]
    assert relative_error(*alone) > 0.1, "the seed counts"
    for name, split in EIGHT.items():
        both = latents(tmp_path / name.replace(" ", ""), *split, "seed=[3, 4]")
        errors = [relative_error(other, one) for one, other in zip(alone, both, strict=True)]
        print(f"{name}: {errors[0]:.1e} and {errors[1]:.1e}")
        assert max(errors) < 1e-4
