"""Animate 2 against a loop over diffusers' transformer and the official encoders, VAE and scheduler.

The loop is that of `diffusers.modular_pipelines.wan_animate_2`: two segments, with guidance.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maxdiffusion import generate_wan, request, variants
from maxdiffusion.media.write import write
from maxdiffusion.models.dit.config import Animate2Config
from maxdiffusion.weights.checkpoint import open_checkpoint
from maxdiffusion.weights.latents_io import load_latents, save_latents
from tests.support import animate2, official
from tests.support.parity import relative_error

HEIGHT, WIDTH, STEPS, LENGTH, FRAMES, SCALE, SHIFT = 64, 96, 2, 9, 14, 3.0, 5.0
PROMPT, NEGATIVE, DRIVING = "a fox dances", "blurry", "人物动作的参考视频"


@pytest.fixture(scope="module")
def net():
    return animate2.transformer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, net) -> Path:
    return animate2.write_checkpoint(tmp_path_factory.mktemp("animate2") / "checkpoint", net)


def smooth(rng, height, width):
    few = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    return np.asarray(few.resize((width, height), Image.Resampling.BICUBIC))


def signed(frames):
    """8-bit f h w c as c f h w in -1..1."""
    return torch.from_numpy(np.asarray(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


def mask(frames, known):
    """Four channels for each latent frame, 1 where one of the first `known` frames is given."""
    found = torch.zeros(1, 4 * (frames - 1) + 1, HEIGHT // 8, WIDTH // 8)
    found[:, :known] = 1
    found = torch.cat([found[:, :1].repeat_interleave(4, dim=1), found[:, 1:]], dim=1)
    return found.view(frames, 4, HEIGHT // 8, WIDTH // 8).transpose(0, 1)


def expected(checkpoint, net, image, driving, noise):
    """Latents of both segments, without the character's, and the frames, -1..1."""
    vae, clip, t5 = official.vae(checkpoint), official.clip(checkpoint), official.t5(checkpoint)
    positive, negative, words = (t5([text], "cpu")[0] for text in (PROMPT, NEGATIVE, DRIVING))
    with torch.no_grad():
        seen, acted = (clip.visual([signed([frame])])[0] for frame in (image, driving[0]))
        [character] = vae.encode([signed([image])])
    character = torch.cat([mask(1, 1), character])
    padded = np.concatenate([driving, driving[::-1]])
    latents, frames = [], []
    for k in range(2):
        start = k * (LENGTH - 1)
        given = torch.zeros(3, LENGTH, HEIGHT, WIDTH)
        if k:
            given[:, :1] = frames[-1][:, -1:]
        with torch.no_grad():
            [video] = vae.encode([signed(padded[start : start + LENGTH])])
            [before] = vae.encode([given])
        condition = torch.cat([character, torch.cat([mask(video.shape[1], 1 if k else 0), before])], dim=1)
        scheduler, x = official.scheduler("unipc", STEPS, SHIFT), noise[k]
        for t in scheduler.timesteps:
            made = [
                animate2.velocity(net, x, t[None].float(), condition, text, seen, (video, words, acted), which)
                for text, which in ((positive, False), (negative, True))
            ]
            velocity = made[1] + SCALE * (made[0] - made[1])
            x = scheduler.step(velocity[None], t, x[None], return_dict=False)[0][0]
        with torch.no_grad():
            [shown] = vae.decode([x[:, 1:]])
        latents.append(official.channels_last(x[:, 1:]))
        frames.append(shown[:, 1:] if k else shown)
    return np.concatenate(latents), official.channels_last(torch.cat(frames, dim=1)[:, :FRAMES])


def test_the_distilled_variant_gives_the_scale_that_no_file_has(checkpoint):
    dims = {"num_layers": 11, "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 36}
    scale = variants.get("wan2.2-animate2-14b-distilled").network["log_scale"]
    row = dataclasses.replace(variants.get("wan2.2-animate2"), network={**dims, "log_scale": scale})
    files = {"transformer": checkpoint / "official" / "diffusion_pytorch_model.safetensors"}
    files |= {net: checkpoint / "official" / f"{net}.safetensors" for net in ("text_encoder", "image_encoder", "vae")}
    opened = open_checkpoint(checkpoint, row, files)
    assert opened.configs["transformer"].adapter == Animate2Config(-1.3)


@pytest.mark.slow
def test_two_segments_equal_the_reference(checkpoint, net, tmp_path):
    rng = np.random.default_rng(6)
    image = smooth(rng, HEIGHT, WIDTH)
    Image.fromarray(image).save(tmp_path / "image.png")
    driving = np.stack([smooth(rng, HEIGHT, WIDTH) for _ in range(FRAMES)])
    folder = write(driving, tmp_path / "driving", 24, "png", {}) or tmp_path / "driving"

    shape = (16, (LENGTH - 1) // 4 + 2, HEIGHT // 8, WIDTH // 8)
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(shape, generator=generator) for _ in range(2)]
    save_latents(
        tmp_path / "noise.safetensors", np.concatenate([official.channels_last(each) for each in noise])[None], {}
    )
    (tmp_path / "run.yml").write_text("model_name: wan2.2-animate2\n")
    job = request.load(
        [
            str(tmp_path / "run.yml"),
            *official.words(checkpoint),
            f"image={tmp_path / 'image.png'}",
            f"driving_video={folder}",
            f"size={WIDTH}*{HEIGHT}",
            f"prompt={PROMPT}",
            f"negative_prompt={NEGATIVE}",
            f"initial_latents={tmp_path / 'noise.safetensors'}",
            f"segment_frame_length={LENGTH}",
            f"num_inference_steps={STEPS}",
            f"guidance_scale={SCALE}",
            f"save_file={tmp_path / 'ours.npy'}",
            *(f"{each}_dtype=float32" for each in ("weights", "activations", "text_encoder", "vae")),
            *("attention=dot_product", "ici_data_parallelism=-1", "ici_context_parallelism=1"),
            "jax_cache_dir=",
        ]
    )
    assert (job.cfg.width, job.cfg.height, job.cfg.num_frames, job.cfg.flow_shift) == (WIDTH, HEIGHT, FRAMES, SHIFT)
    generate_wan.run(job)
    latents, frames = expected(checkpoint, net, image, driving, noise)
    ours, _ = load_latents(tmp_path / "ours.latents.safetensors")
    error = relative_error(ours[0], latents)
    levels = (frames / 2 + 0.5).clip(0, 1) * 255
    frames_off = np.abs(np.load(tmp_path / "ours.npy") - levels).max()  # of which rounding is 0.5
    print(f"Animate 2, two segments: latents within {error:.1e}, frames within {frames_off:.3f} levels")
    assert error < 1e-5
    assert frames_off < 0.51


@pytest.mark.slow
def test_branches_of_guidance_on_different_devices_share_the_driving_video(checkpoint, tmp_path):
    """Two passes on one device, then one batch of both branches over data 2 x ring 2 x ulysses 2, with two videos."""
    rng = np.random.default_rng(6)
    Image.fromarray(smooth(rng, 61, 97)).save(tmp_path / "image.png")
    driving = np.stack([smooth(rng, HEIGHT, WIDTH) for _ in range(LENGTH)])
    write(driving, tmp_path / "driving.npy", 24, "npy", {})
    words = [*animate2.words(checkpoint, tmp_path), f"image={tmp_path / 'image.png'}", "seed=[1, 2]", "jax_cache_dir="]
    words += [f"driving_video={tmp_path / 'driving.npy'}", f"size={WIDTH}*{HEIGHT}", f"num_inference_steps={STEPS}"]
    words += [f"guidance_scale={SCALE}", "output_format=npy"]
    split = ["attention=ulysses_ring", "ulysses_shards=2", "ici_context_parallelism=4", "ici_data_parallelism=2"]
    meshes = {
        "one": [*official.ONE, "guidance_mode=two_pass", "per_device_batch_size=1"],
        "eight": [*split, "guidance_mode=batched", "per_device_batch_size=2"],
    }
    made = {}
    for name, mesh in meshes.items():
        paths = generate_wan.run(request.load([*words, *mesh, f"output_dir={tmp_path / name}"]))
        stems = (str(path).removesuffix(".npy") for path in paths)
        made[name] = np.concatenate([load_latents(Path(f"{stem}.latents.safetensors"))[0] for stem in stems])
    error = relative_error(made["eight"], made["one"])
    print(f"Animate 2, both branches in one batch on eight devices: latents within {error:.1e}")
    assert len(made["one"]) == 2 and error < 1e-5
