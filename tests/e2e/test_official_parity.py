"""The same files, prompts and noise through the official text-to-video and through the command."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from maxdiffusion import generate_wan, request
from maxdiffusion.weights.latents_io import load_latents, save_latents
from tests.support import official
from tests.support.parity import relative_error
from tests.support.videos import psnr

PROMPT, NEGATIVE = "a green  square &amp; a circle", "blurry"
SIZE, FRAMES, STEPS, SHIFT, SEED = 64, 9, 20, 3.0, 7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of a variant, written once."""
    return functools.cache(lambda name: official.write_checkpoint(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize(
    ("model", "boundary", "scales", "solver"),
    [
        ("wan2.2-t2v", 0.875, (3.0, 4.0), "unipc"),
        pytest.param("wan2.2-t2v", 0.875, (3.0, 4.0), "dpm++", marks=pytest.mark.slow),
        pytest.param("wan2.1-t2v", 0.0, (5.0, 5.0), "unipc", marks=pytest.mark.slow),
    ],
)
def test_text_to_video(tmp_path, checkpoint, model, boundary, scales, solver):
    """With two experts, 6 of the 20 steps are of high noise; a boundary of 0 gives all to one transformer."""
    pipe = official.pipeline(checkpoint(model), "t2v-A14B", boundary=boundary)
    (theirs,), video = official.generate(
        pipe,
        PROMPT,
        size=(SIZE, SIZE),
        frame_num=FRAMES,
        shift=SHIFT,
        sample_solver=solver,
        sampling_steps=STEPS,
        guide_scale=scales,
        n_prompt=NEGATIVE,
        seed=SEED,
    )
    frames, h, w, channels = theirs.shape
    save_latents(tmp_path / "noise.safetensors", official.noise(SEED, channels, frames, h, w)[None], {})
    (tmp_path / "run.yml").write_text(f"prompt: '{PROMPT}'\nnegative_prompt: '{NEGATIVE}'\n")
    words = [
        f"model_name={model}",
        *official.words(checkpoint(model)),
        f"size={SIZE}*{SIZE}",
        f"frame_num={FRAMES}",
        f"sample_steps={STEPS}",
        f"sample_shift={SHIFT}",
        f"sample_solver={solver}",
        f"guidance_scale={scales[1]}",
        *([f"guidance_scale_2={scales[0]}", f"boundary_ratio={boundary}"] if boundary else []),
        f"initial_latents={tmp_path / 'noise.safetensors'}",
        f"save_file={tmp_path / 'ours.npy'}",
        *(f"{key}=float32" for key in ("weights_dtype", "activations_dtype", "text_encoder_dtype")),
        "jax_cache_dir=",
        "log_level=error",
    ]
    job = request.load([str(tmp_path / "run.yml"), *words])
    (path,) = generate_wan.run(job)
    error = relative_error(load_latents(tmp_path / "ours.latents.safetensors")[0][0], theirs)
    figure = psnr(np.load(path), np.round((video + 1) * 127.5).astype(np.uint8))
    print(f"{model}, {solver}: latents {error:.1e}, video {figure:.1f} dB")
    assert error < 1e-5
    assert figure > 60 and video.std() > 0.1
    if boundary:
        assert [expert[:2] for expert in request.session.recipe_of(job).experts] == [(0, 6), (6, STEPS)]
