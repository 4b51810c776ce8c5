"""The same weights, prompt and noise through diffusers' WanPipeline and through the entry page."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from maxdiffusion import generate_wan
from maxdiffusion.request import load
from maxdiffusion.weights.latents_io import save_latents
from tests.support.videos import psnr

PROMPT = "a green square moving left on a black background"


def reference(checkpoint, noise, *, size, frames, steps, scale):
    """uint8 f h w c, quantised as we do, so that the figure is not the quantisation's own 59 dB."""
    pipeline = diffusers.WanPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    shift = pipeline.scheduler.config.flow_shift
    video = pipeline(
        PROMPT,
        negative_prompt="blurry",
        height=size,
        width=size,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=scale,
        latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
        output_type="np",
    ).frames[0]
    return shift, np.round(video * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "model", "size", "frames", "channels"),
    [
        ("random_checkpoint", "wan2.1-t2v", 64, 9, 16),
        pytest.param("bundled", "wan-tiny-t2v", 96, 17, 8, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("loop", "guidance", "data", "context"),
    [("steps", "batched", -1, 1), pytest.param("scan", "two_pass", 1, -1, marks=pytest.mark.slow)],
)
def test_video_equals_the_reference(
    request, tmp_path, name, model, size, frames, channels, loop, guidance, data, context
):
    """Over all devices there are: the guidance pair split over the data axis, or the tokens over the context axis."""
    checkpoint = request.getfixturevalue(name)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1, (frames - 1) // 4 + 1, size // 8, size // 8, channels), np.float32)
    save_latents(tmp_path / "noise.safetensors", noise, {})
    shift, theirs = reference(checkpoint, noise, size=size, frames=frames, steps=6, scale=4.0)
    (tmp_path / "run.yml").write_text("# all keys are given as words\n")
    job = load(
        [
            str(tmp_path / "run.yml"),
            f"model_name={model}",
            "conventions=diffusers",
            f"pretrained_model_name_or_path={checkpoint}",
            f"prompt={PROMPT}",
            "negative_prompt=blurry",
            f"height={size}",
            f"width={size}",
            f"num_frames={frames}",
            "num_inference_steps=6",
            "guidance_scale=4",
            f"flow_shift={shift}",
            f"initial_latents={tmp_path / 'noise.safetensors'}",
            f"save_file={tmp_path / 'ours.npy'}",
            "weights_dtype=float32",
            "jax_cache_dir=",
            "activations_dtype=float32",
            "text_encoder_dtype=float32",
            f"loop={loop}",
            f"guidance_mode={guidance}",
            f"ici_data_parallelism={data}",
            f"ici_context_parallelism={context}",
        ]
    )
    (path,) = generate_wan.run(job)
    ours = np.load(path)
    assert ours.shape == theirs.shape
    assert theirs.std() > 5, "a flat video would compare equal to anything flat"
    figure = psnr(ours, theirs)
    print(f"{name}, {loop}, {guidance}: {figure:.1f} dB")
    assert figure > 60
