"""Animate against the official code: the same files and noise through `WanAnimate.generate` and the entry page.

Neither prompt nor size nor number of frames is given: the official text, and those of the pose.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maxdiffusion import generate_wan, request
from maxdiffusion.media.write import write
from maxdiffusion.request import Segments
from maxdiffusion.weights.latents_io import load_latents, save_latents
from tests.support import official, official_animate
from tests.support.parity import relative_error

HEIGHT, WIDTH, STEPS = 64, 96, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return official.write_checkpoint(
        tmp_path_factory.mktemp("animate") / "checkpoint",
        "wan2.2-animate",
        transformers={"transformer": official_animate.transformer()},
        config=official_animate.CONFIG,
    )


def clips(folder: Path, frames: int) -> None:
    """Smooth random videos and a character of other proportions, under the official names."""
    rng = np.random.default_rng(6)
    sizes = {"pose": (HEIGHT, WIDTH), "face": (512, 512), "bg": (HEIGHT, WIDTH), "mask": (HEIGHT, WIDTH)}
    for name, (height, width) in sizes.items():
        few = [Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)) for _ in range(frames)]
        images = [image.resize((width, height), Image.Resampling.BICUBIC) for image in few]
        if name == "mask":
            images = [image.convert("L").convert("RGB") for image in images]
        write(np.stack([np.asarray(image) for image in images]), folder / f"src_{name}.mp4", 30, "mp4", {})
    Image.fromarray(rng.integers(0, 256, (150, 119, 3), dtype=np.uint8)).save(folder / "src_ref.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "length", "carried", "frames", "scale"), [("animate", 9, 1, 14, 1.0), ("replace", 9, 5, 12, 3.0)]
)
def test_animate_equals_the_official_code(checkpoint, tmp_path, mode, length, carried, frames, scale):
    """Two segments, the second filled up behind the video's end; without guidance, and with it."""
    clips(tmp_path, frames)
    segments = Segments(frames, length, carried).starts
    assert len(segments) == 2
    latents, video = official.generate(
        official_animate.pipeline(checkpoint),
        str(tmp_path),
        replace_flag=mode == "replace",
        clip_len=length,
        refert_num=carried,
        sample_solver="unipc",
        sampling_steps=STEPS,
        guide_scale=scale,
        n_prompt="blurry",
        seed=3,
    )
    theirs = np.concatenate(latents)
    assert len(video) == frames and theirs.std() > 0.1

    shape = (16, (length - 1) // 4 + 2, HEIGHT // 8, WIDTH // 8)
    generator = torch.Generator().manual_seed(3)
    noise = np.concatenate([official.channels_last(torch.randn(shape, generator=generator)) for _ in segments])
    save_latents(tmp_path / "noise.safetensors", noise[None], {})
    used = {"pose": "pose", "face": "face"} | ({"background": "bg", "mask": "mask"} if mode == "replace" else {})
    (tmp_path / "run.yml").write_text("model_name: wan2.2-animate\n")
    job = request.load(
        [
            str(tmp_path / "run.yml"),
            *official.words(checkpoint),
            f"image={tmp_path / 'src_ref.png'}",
            *(f"{key}_video={tmp_path / f'src_{name}.mp4'}" for key, name in used.items()),
            f"mode={mode}",
            "negative_prompt=blurry",
            f"initial_latents={tmp_path / 'noise.safetensors'}",
            f"segment_frame_length={length}",
            f"prev_segment_conditioning_frames={carried}",
            f"num_inference_steps={STEPS}",
            f"guidance_scale={scale}",
            f"save_file={tmp_path / 'ours.npy'}",
            *(f"{net}_dtype=float32" for net in ("weights", "activations", "text_encoder", "vae")),
            *("attention=dot_product", "ici_data_parallelism=-1", "ici_context_parallelism=1"),
            "jax_cache_dir=",
        ]
    )
    assert (job.cfg.width, job.cfg.height, job.cfg.num_frames) == (WIDTH, HEIGHT, frames)
    assert [one.prompt for one in job.videos] == ["视频中的人在做动作"]
    generate_wan.run(job)
    ours, _ = load_latents(tmp_path / "ours.latents.safetensors")
    error = relative_error(ours[0], theirs)
    print(f"Animate, {mode}, {len(segments)} segments: latents within {error:.1e}")
    assert error < 1e-5
    frames_off = np.abs(np.load(tmp_path / "ours.npy") - (video / 2 + 0.5).clip(0, 1) * 255).max()
    assert frames_off < 0.51
