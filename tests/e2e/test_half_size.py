"""`low_resolution_steps`: the latents of a loop that is written out, with the transformer of diffusers and scipy."""

from __future__ import annotations

import itertools
import json

import diffusers
import numpy as np
import pytest
import scipy.fft
import torch

from maxdiffusion import generate_wan
from maxdiffusion.denoise.noise import noise
from maxdiffusion.denoise.solvers import SOLVERS
from maxdiffusion.errors import UserError
from maxdiffusion.request import load
from maxdiffusion.weights.latents_io import load_latents
from tests.support.videos import CONFIGS

PROMPT, STEPS, LOW, SIDE, FRAMES, SEED, SCALE, SHIFT = "a green square", 12, 5, 64, 5, 7, 4.0, 3.0


@torch.no_grad()
def theirs(checkpoint):
    """Euler's method by the official levels: `LOW` steps at half size, the corner of a cosine transform, the rest."""
    pipeline = diffusers.WanPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    texts = pipeline.encode_prompt(PROMPT, "blurry", max_sequence_length=512, device="cpu")

    def velocity(x, sigma):
        latents = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3)))
        time = torch.tensor([1000 * sigma], dtype=torch.float32)
        c, u = (pipeline.transformer(latents, time, each, return_dict=False)[0] for each in texts)
        return (u + SCALE * (c - u)).numpy().transpose(0, 2, 3, 4, 1)

    sigmas = SOLVERS["euler"].schedule(STEPS, SHIFT).sigmas
    frames, side, channels = (FRAMES - 1) // 4 + 1, SIDE // 8, 16
    start = scipy.fft.dctn(np.asarray(noise([SEED], (frames, side, side, channels))), axes=(2, 3), norm="ortho")
    corner = np.s_[:, :, : side // 2, : side // 2]
    x = scipy.fft.idctn(start[corner], axes=(2, 3), norm="ortho").astype(np.float32)
    for i in range(LOW):
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity(x, sigmas[i])
    sigma = float(sigmas[LOW])
    grid = sigma * start
    grid[corner] = scipy.fft.dctn(x, axes=(2, 3), norm="ortho")
    x = (scipy.fft.idctn(grid, axes=(2, 3), norm="ortho") * 2 / (1 + sigma)).astype(np.float32)
    levels = [np.float32(2 * sigma / (1 + sigma)), *sigmas[LOW + 1 :]]
    for level, following in itertools.pairwise(levels):
        x = x + (following - level) * velocity(x, level)
    return x


@pytest.mark.slow
def test_latents_are_those_of_the_loop_written_out(tmp_path, random_checkpoint):
    """Over all devices there are: the smaller latents have fewer tokens than devices."""
    (tmp_path / "run.yml").write_text("# all keys are given as words\n")
    words = {
        "model_name": "wan2.1-t2v",
        "pretrained_model_name_or_path": random_checkpoint,
        "prompt": PROMPT,
        "negative_prompt": "blurry",
        "size": f"{SIDE}*{SIDE}",
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "low_resolution_steps": LOW,
        "solver": "euler",
        "guidance_scale": SCALE,
        "flow_shift": SHIFT,
        "seed": SEED,
        "save_file": tmp_path / "ours.npy",
        **dict.fromkeys(("weights_dtype", "activations_dtype", "text_encoder_dtype"), "float32"),
        "jax_cache_dir": "",
        "log_level": "error",
        "contact_sheet": 0,
    }
    generate_wan.run(load([str(tmp_path / "run.yml"), *(f"{key}={value}" for key, value in words.items())]))
    found, wanted = load_latents(tmp_path / "ours.latents.safetensors")[0], theirs(random_checkpoint)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
    assert json.loads((tmp_path / "ours.json").read_text())["low_resolution_steps"] == LOW


@pytest.mark.parametrize(
    ("page", "words", "message"),
    [
        ("wan_tiny_i2v", ["image=IMAGE"], "is not used by .* one size"),
        ("wan_tiny", ["solver=renoise"], "few-step"),
        ("wan_tiny", ["num_inference_steps=9"], "few-step"),
        ("wan_tiny", ["low_resolution_steps=12"], "at most 11"),
        ("wan_tiny", ["size=48*32"], "width=48 cannot be halved .* the nearest are 32 and 64"),
        ("wan_tiny", ["cache=sea", "cache_psnr=40"], "cache_psnr exclude each other"),
        ("wan_tiny", ["verify=true"], "verify exclude each other"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, page, words, message):
    defaults = {"size": "64*64", "num_inference_steps": "12", "low_resolution_steps": "5", "prompt": "x"}
    words = [word.replace("IMAGE", str(CONFIGS.parent / "docs" / "wan_tiny.png")) for word in words]
    given = {word.partition("=")[0] for word in words}
    more = [f"{key}={value}" for key, value in defaults.items() if key not in given]
    with pytest.raises(UserError, match=message):
        load([str(CONFIGS / f"{page}.yml"), *words, *more, f"output_dir={tmp_path}"])
