"""Image variants and two experts: the same random weights, inputs and noise through diffusers and the entry page."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from maxdiffusion import generate_wan, request
from maxdiffusion.weights.latents_io import save_latents
from tests.support.videos import psnr

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "make_random_checkpoint.py"))
TRANSFORMER = SCRIPT["PRESETS"]["tiny"]["transformer"]
VAE22 = {
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "z_dim": 8,
    "decoder_base_dim": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.1 * i for i in range(8)],
    "latents_std": [1 + 0.1 * i for i in range(8)],
}
IMAGE_TOKENS = {"image_dim": 16, "added_kv_proj_dim": 24}
IN36 = {"in_channels": 36, "out_channels": 16}
PROMPTS = ("a green square moving left", "two red circles")

# What each checkpoint adds: the transformer's keys, whether there are two, the VAE's keys, and the pipeline's.
CHECKPOINTS = {
    "wan2.1-i2v": (IN36 | IMAGE_TOKENS, False, {}, {}),
    "wan2.1-flf2v": (IN36 | IMAGE_TOKENS | {"pos_embed_seq_len": 10}, False, {}, {}),
    "wan2.2-t2v": ({}, True, {}, {"boundary_ratio": 0.8}),
    "wan2.2-i2v": (IN36, True, {}, {"boundary_ratio": 0.8}),
    "wan2.2-ti2v": ({"in_channels": 8, "out_channels": 8}, False, VAE22, {"expand_timesteps": True}),
}


def randomised(module, seed):
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            (values,) = SCRIPT["numbers"](rng, name, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values).reshape(parameter.shape))
    return module.eval()


def write_checkpoint(folder, model):
    """The reference's pipeline, saved; returns it."""
    keys, two, vae, own = CHECKPOINTS[model]
    image = ("in_channels" in keys and "i2v" in model) or "flf2v" in model
    SCRIPT["write_tokenizer"](folder / "tokenizer")
    text = SCRIPT["PRESETS"]["tiny"]["text_encoder"] | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    parts = {
        "tokenizer": transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        "text_encoder": randomised(transformers.UMT5EncoderModel(transformers.UMT5Config(**text)), 0),
        "transformer": randomised(diffusers.WanTransformer3DModel(**TRANSFORMER | keys), 1),
        "vae": randomised(diffusers.AutoencoderKLWan(**{"base_dim": 8, **vae}), 2),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **own,
    }
    if two:
        parts["transformer_2"] = randomised(diffusers.WanTransformer3DModel(**TRANSFORMER | keys), 3)
    if "image_dim" in keys:
        tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        clip = transformers.CLIPVisionConfig(**tower, image_size=28, patch_size=14, hidden_act="gelu")
        parts["image_encoder"] = randomised(transformers.CLIPVisionModel(clip), 4)
        parts["image_processor"] = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    cls = diffusers.WanImageToVideoPipeline if image and model != "wan2.2-ti2v" else diffusers.WanPipeline
    pipeline = cls(**parts)
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(path, seed, size):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    image = small.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
    image.save(path)
    return image


# Twelve tokens over ring 4 x Ulysses 2, which they do not divide.
EIGHT = ("attention=ulysses_ring", "ulysses_shards=2", "ici_context_parallelism=8")
# As far as the numbers go one device: every device does the whole of it, attention densely.
ONE = ("ici_data_parallelism=-1", "ici_context_parallelism=1")


def common(folder, model, checkpoint, noise, size, steps=4):
    save_latents(folder / "noise.safetensors", noise, {})
    (folder / "run.yml").write_text("# all keys are given as words\n")
    return [
        str(folder / "run.yml"),
        f"model_name={model}",
        "conventions=diffusers",
        f"pretrained_model_name_or_path={checkpoint}",
        f"prompt={list(PROMPTS[: len(noise)])!r}",
        "negative_prompt=blurry",
        f"size={size}x{size}",
        "num_frames=9",
        f"num_inference_steps={steps}",
        "flow_shift=3",
        f"initial_latents={folder / 'noise.safetensors'}",
        *(f"{key}_dtype=float32" for key in ("weights", "activations", "text_encoder")),
        "output_format=npy",
        f"output_dir={folder}",
        "jax_cache_dir=",
        "log_level=error",
    ]


def prepare(tmp_path, model, batch, images, scales=(4.0,), steps=4, words=()):
    """The reference's pipeline, the noise, the images of each video, and the words of a run of ours."""
    size, channels, down = (64, 8, 16) if model == "wan2.2-ti2v" else (32, 16, 8)
    pipeline = write_checkpoint(tmp_path / "checkpoint", model)
    noise = np.random.default_rng(7).standard_normal((batch, 3, size // down, size // down, channels), np.float32)
    shown = [[picture(tmp_path / f"{at}{i}.png", 10 * i + at, size) for at in range(images)] for i in range(batch)]
    words = [*words, f"guidance_scale={scales[0]}", *(f"guidance_scale_2={scale}" for scale in scales[1:])]
    for at, key in enumerate(("image", "last_image")[:images]):
        words.append(f"{key}={[str(tmp_path / f'{at}{i}.png') for i in range(batch)]!r}")
    return pipeline, noise, shown, [*common(tmp_path, model, tmp_path / "checkpoint", noise, size, steps), *words]


def case(tmp_path, model, batch, images, scales=(4.0,), steps=4, words=(), patch=lambda pipeline: None):
    """Compares each video, made on eight devices, with the reference's of the same noise and images."""
    pipeline, noise, shown, words = prepare(tmp_path, model, batch, images, scales, steps, words)
    patch(pipeline)
    if "expert_residency=in_turn" not in words:  # else batch after batch
        words.append(f"per_device_batch_size={batch}")
    ours = generate_wan.run(request.load([*words, *EIGHT]))
    if model == "wan2.2-ti2v" and images:
        pipeline = diffusers.WanImageToVideoPipeline(**pipeline.components, expand_timesteps=True)
        pipeline.set_progress_bar_config(disable=True)
    size = 64 if model == "wan2.2-ti2v" else 32
    for i, path in enumerate(ours):
        theirs = pipeline(
            prompt=PROMPTS[i],
            negative_prompt="blurry",
            height=size,
            width=size,
            num_frames=9,
            num_inference_steps=steps,
            guidance_scale=scales[0],
            latents=torch.from_numpy(noise[i : i + 1].transpose(0, 4, 1, 2, 3).copy()),
            output_type="np",
            **dict(zip(("image", "last_image"), shown[i], strict=False)),
            **({"guidance_scale_2": scales[1]} if len(scales) > 1 else {}),
        ).frames[0]
        theirs, video = np.round(theirs * 255).astype(np.uint8), np.load(path)
        assert theirs.std() > 5, "a flat video would compare equal to anything flat"
        figure = psnr(video, theirs)
        print(f"{model}, {images} images, video {i}: {figure:.1f} dB")
        assert video.shape == theirs.shape and figure > 60


@pytest.mark.slow
def test_image_to_video_at_batch_2(tmp_path):
    """Each video has its own prompt and image; the image counts in both branches of guidance."""
    case(tmp_path, "wan2.1-i2v", 2, 1)


@pytest.mark.slow
def test_first_and_last_frame(tmp_path):
    case(tmp_path, "wan2.1-flf2v", 1, 2)


@pytest.mark.slow
def test_first_and_last_frame_without_position_embedding(tmp_path):
    """The reference then needs both images' tokens in one row; it makes two rows of them."""

    def in_one_row(pipeline):
        encode = pipeline.encode_image
        pipeline.encode_image = lambda *args: encode(*args).reshape(1, -1, 16)

    case(tmp_path, "wan2.1-i2v", 1, 2, patch=in_one_row)


@pytest.mark.slow
@pytest.mark.parametrize(("residency", "low"), [("together", 3.0), ("in_turn", 3.0), ("in_turn", 1.0)])
def test_two_experts_from_text(tmp_path, residency, low):
    """6 steps with shift 3: 999 937 857 749 600 375, of which three lie above the boundary.

    At a scale of 1 the reference computes both branches, and ours one.
    """
    case(tmp_path, "wan2.2-t2v", 2, 0, (4.0, low), 6, (f"expert_residency={residency}", "boundary_ratio=0.8"))


@pytest.mark.slow
def test_a_first_expert_without_guidance_is_as_with_both_branches(tmp_path):
    *_, words = prepare(tmp_path, "wan2.2-t2v", 1, 0, (1.0, 3.0), 6, ("boundary_ratio=0.8",))
    both = [word.replace("guidance_scale=1.0", "guidance_scale=1.0000001") for word in words]
    (one,), (two,) = (generate_wan.run(request.load(each)) for each in (words, both))
    assert psnr(np.load(one), np.load(two)) > 60


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 2])
def test_two_experts_from_images(tmp_path, images):
    case(tmp_path, "wan2.2-i2v", 1, images, (3.5, 2.5), 6, ("boundary_ratio=0.8", "loop=scan"))


@pytest.mark.slow
@pytest.mark.parametrize("images", [0, 1])
def test_timesteps_by_token(tmp_path, images):
    case(tmp_path, "wan2.2-ti2v", 2, images)


@pytest.mark.slow
def test_lines_with_and_without_an_image(tmp_path):
    """Each line's video is the one that it would be alone."""
    *_, words = prepare(tmp_path, "wan2.2-ti2v", 1, 1)
    words = [word for word in words if not word.startswith(("image=", "initial_latents=", "output_dir="))]
    lines = [{"output": "text"}, {"output": "image", "image": str(tmp_path / "00.png")}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    together = [*words, f"output_dir={tmp_path}/together", "per_device_batch_size=2"]
    both = generate_wan.run(request.load([*together, f"prompts={tmp_path}/p.jsonl"]))
    for path, given in zip(both, ([], [f"image={tmp_path}/00.png"]), strict=True):
        (lone,) = generate_wan.run(request.load([*words, f"output_dir={tmp_path}/lone", *given]))
        assert psnr(np.load(path), np.load(lone)) > 60


@pytest.mark.parametrize(
    ("model", "images", "words"),
    [
        pytest.param("wan2.2-ti2v", 1, (), marks=pytest.mark.slow),
        pytest.param("wan2.1-i2v", 1, (), marks=pytest.mark.slow),
        pytest.param("wan2.1-flf2v", 2, (), marks=pytest.mark.slow),
        pytest.param("wan2.2-t2v", 0, ("guidance_scale_2=2", "boundary_ratio=0.8"), marks=pytest.mark.slow),
        pytest.param("wan2.2-i2v", 1, ("guidance_scale_2=2", "boundary_ratio=0.8"), marks=pytest.mark.slow),
    ],
)
def test_the_same_video_on_eight_devices(tmp_path, model, images, words):
    *_, words = prepare(tmp_path, model, 1, images, words=words)
    (one,), (eight,) = (generate_wan.run(request.load([*words, *split])) for split in (ONE, EIGHT))
    figure = psnr(np.load(eight), np.load(one))
    print(f"{model} on eight devices: {figure:.1f} dB")
    assert figure > 60
