"""VACE, video-to-video and Animate: the same weights, inputs and noise through diffusers and the entry page."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from maxdiffusion import generate_wan, request
from maxdiffusion.media.read import read_video
from maxdiffusion.media.samples import read_samples
from maxdiffusion.media.write import write
from maxdiffusion.request import Segments
from maxdiffusion.weights.latents_io import save_latents
from tests.support import official
from tests.support.ffmpeg import ffmpeg
from tests.support.videos import psnr

PROMPT = "a green square moving left on a black background"
HEIGHT, WIDTH, FRAMES = 64, 96, 9
STEPS, SCALE = 4, 4.0
BOUNDARY = 0.875


@pytest.fixture(scope="session")
def vace_checkpoint(random_checkpoint, tmp_path_factory) -> Path:
    """The random checkpoint with a VACE transformer whose hints lie unevenly."""
    folder = tmp_path_factory.mktemp("vace") / "checkpoint"
    shutil.copytree(random_checkpoint, folder, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    own = json.loads((random_checkpoint / "transformer" / "config.json").read_text())
    shape = {key: own[key] for key in ("num_attention_heads", "attention_head_dim", "ffn_dim", "text_dim", "freq_dim")}
    transformer = diffusers.WanVACETransformer3DModel(**shape, num_layers=4, vace_layers=[0, 1, 3])
    transformer.save_pretrained(folder / "transformer")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "WanVACEPipeline", "transformer": ["diffusers", "WanVACETransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def vace_experts(vace_checkpoint, tmp_path_factory) -> Path:
    """The VACE checkpoint with a second expert, as VACE-Fun A14B has it."""
    folder = tmp_path_factory.mktemp("vace_experts") / "checkpoint"
    shutil.copytree(vace_checkpoint, folder)
    torch.manual_seed(1)
    config = diffusers.WanVACETransformer3DModel.load_config(folder / "transformer")
    diffusers.WanVACETransformer3DModel.from_config(config).save_pretrained(folder / "transformer_2")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": BOUNDARY}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A smooth moving video, a mask (its right half) and two images, all without loss."""
    folder = tmp_path_factory.mktemp("files")
    f, h, w = np.meshgrid(np.arange(FRAMES), np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    video = np.stack([(h * 4 + f * 9) % 256, (w * 2 + f * 5) % 256, (h + w) % 256], axis=-1).astype(np.uint8)
    mask = np.repeat(np.where(w >= WIDTH // 2, 255, 20)[..., None], 3, axis=-1).astype(np.uint8)
    for name, frames in (("video", video), ("mask", mask)):
        write(frames, folder / name, 16, "png", {})
    rng = np.random.default_rng(5)
    for i, size in enumerate(((50, 40), (70, 33))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def frames_of(folder: Path) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in sorted(folder.glob("*.png"))]


def noise_file(folder: Path, frames: int) -> tuple[np.ndarray, Path]:
    noise = np.random.default_rng(0).standard_normal((1, frames, HEIGHT // 8, WIDTH // 8, 16), np.float32)
    save_latents(folder / "noise.safetensors", noise, {})
    return noise, folder / "noise.safetensors"


def made(
    folder: Path,
    *words: str,
    save: str = "ours.npy",
    num_frames: int = FRAMES,
    guidance_scale: float = SCALE,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    conventions: str = "diffusers",
) -> Path:
    (folder / "run.yml").write_text("# all keys are given as words\n")
    common = [
        f"conventions={conventions}",
        f"prompt={PROMPT}",
        "negative_prompt=blurry",
        f"height={size[0]}",
        f"width={size[1]}",
        f"num_frames={num_frames}",
        f"num_inference_steps={STEPS}",
        f"guidance_scale={guidance_scale}",
        f"save_file={folder / save}",
        "overwrite=true",
        "weights_dtype=float32",
        "activations_dtype=float32",
        "text_encoder_dtype=float32",
        "jax_cache_dir=",
    ]
    (path,) = generate_wan.run(request.load([str(folder / "run.yml"), *common, *words]))
    return Path(str(path))


def run(folder: Path, *words: str, **given: Any) -> np.ndarray:
    return np.load(made(folder, *words, **given))


def reference(cls: type, checkpoint: Path, **given: object) -> tuple[float, np.ndarray]:
    pipeline = cls.from_pretrained(checkpoint, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    common = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "guidance_scale": SCALE}
    video = pipeline(prompt=PROMPT, negative_prompt="blurry", output_type="np", **common, **given).frames[0]
    assert video.std() > 0.02, "a flat video would compare equal to anything flat"
    return pipeline.scheduler.config.flow_shift, np.round(video * 255).astype(np.uint8)


@pytest.mark.parametrize(
    "given", ["video mask images", *(pytest.param(given, marks=pytest.mark.slow) for given in ("images", "video"))]
)
def test_vace_equals_the_reference(vace_checkpoint, files, tmp_path, given):
    images = [files / f"{i}.png" for i in range(2)] if "images" in given else []
    noise, path = noise_file(tmp_path, (FRAMES - 1) // 4 + 1 + len(images))
    shift, theirs = reference(
        diffusers.WanVACEPipeline,
        vace_checkpoint,
        latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
        num_frames=FRAMES,
        video=frames_of(files / "video") if "video" in given else None,
        mask=frames_of(files / "mask") if "mask" in given else None,
        reference_images=[Image.open(image) for image in images] or None,
        conditioning_scale=[0.5, 1.0, 1.5],
    )
    words = [f"video={files / 'video'}"] * ("video" in given) + [f"mask={files / 'mask'}"] * ("mask" in given)
    ours = run(
        tmp_path,
        "model_name=wan2.1-vace",
        f"pretrained_model_name_or_path={vace_checkpoint}",
        f"flow_shift={shift}",
        f"initial_latents={path}",
        f"reference_images=[{','.join(map(str, images))}]",
        "conditioning_scale=[0.5,1,1.5]",
        *words,
    )
    figure = psnr(ours, theirs)
    print(f"VACE, {given}: {figure:.1f} dB")
    assert figure > 60


@pytest.mark.slow
def test_two_vace_experts_equal_the_reference(vace_experts, files, tmp_path):
    """A guidance scale for each, and one scale for all hints."""
    noise, path = noise_file(tmp_path, (FRAMES - 1) // 4 + 1)
    shift, theirs = reference(
        diffusers.WanVACEPipeline,
        vace_experts,
        latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
        num_frames=FRAMES,
        video=frames_of(files / "video"),
        mask=frames_of(files / "mask"),
        conditioning_scale=0.7,
        guidance_scale_2=3.0,
    )
    words = [
        f"pretrained_model_name_or_path={vace_experts}",
        f"flow_shift={shift}",
        f"initial_latents={path}",
        f"video={files / 'video'}",
        f"mask={files / 'mask'}",
        "conditioning_scale=0.7",
        "guidance_scale_2=3",
    ]
    ours = run(tmp_path, "model_name=wan2.2-vace", *words)
    figure = psnr(ours, theirs)
    print(f"two VACE experts: {figure:.1f} dB")
    assert figure > 60
    one = run(tmp_path, "model_name=wan2.2-vace", *words, "boundary_ratio=0")
    assert psnr(one, theirs) < 60, "the experts are too alike to be told apart"


@pytest.mark.slow
def test_vace_by_the_official_conventions(vace_checkpoint, tmp_path):
    """Diffusers with the official noise levels, references in the other order, and frames that the test has chosen."""
    f, h, w = np.meshgrid(np.arange(20), np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    video = np.stack([(h * 3 + f * 7) % 256, (w * 2 + f * 4) % 256, (h + w + f) % 256], axis=-1).astype(np.uint8)
    mask = np.repeat(np.where(w >= WIDTH // 2 + f, 255, 20)[..., None], 3, axis=-1).astype(np.uint8)
    for name, frames in (("video", video), ("mask", mask)):
        write(frames, tmp_path / f"{name}.mp4", 25, "mp4", {})
    images = [Image.fromarray(video[i, :height, :width]) for i, (height, width) in enumerate(((48, 32), (40, 64)))]
    for i, image in enumerate(images):  # of sizes that diffusers does not round first
        image.save(tmp_path / f"{i}.png")
    spread = [0, 2, 4, 7, 9, 12, 14, 17, 19]  # in 19.5 of the 20 frames, nine at equal distances
    noise, path = noise_file(tmp_path, (FRAMES - 1) // 4 + 1 + len(images))
    pipeline = diffusers.WanVACEPipeline.from_pretrained(vace_checkpoint, torch_dtype=torch.float32)
    scheduler = official.load("utils.fm_solvers_unipc").FlowUniPCMultistepScheduler(shift=1)
    scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, shift=5.0)
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    chosen = ([Image.fromarray(read_video(tmp_path / f"{name}.mp4")[i]) for i in spread] for name in ("video", "mask"))
    theirs = pipeline(
        **dict(zip(("video", "mask"), chosen, strict=True)),
        prompt=PROMPT,
        negative_prompt="blurry",
        reference_images=images[::-1],
        latents=torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy()),
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="np",
    ).frames[0]
    assert theirs.std() > 0.02
    ours = run(
        tmp_path,
        "model_name=wan2.1-vace",
        f"pretrained_model_name_or_path={vace_checkpoint}",
        "flow_shift=5",
        f"initial_latents={path}",
        f"video={tmp_path / 'video.mp4'}",
        f"mask={tmp_path / 'mask.mp4'}",
        f"reference_images=[{tmp_path / '0.png'},{tmp_path / '1.png'}]",
        conventions="official",
    )
    figure = psnr(ours, np.round(theirs * 255).astype(np.uint8))
    print(f"VACE by the official conventions: {figure:.1f} dB")
    assert figure > 60


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_changed_video_equals_the_reference(random_checkpoint, files, tmp_path, monkeypatch, strength):
    noise, path = noise_file(tmp_path, (FRAMES - 1) // 4 + 1)
    drawn = torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy())
    pipeline_module = "diffusers.pipelines.wan.pipeline_wan_video2video.randn_tensor"
    monkeypatch.setattr(
        pipeline_module, lambda *args, **kwargs: drawn
    )  # its `latents` would be taken as noised already
    shift, theirs = reference(
        diffusers.WanVideoToVideoPipeline, random_checkpoint, video=frames_of(files / "video"), strength=strength
    )
    ours = run(
        tmp_path,
        "model_name=wan2.1-t2v",
        f"pretrained_model_name_or_path={random_checkpoint}",
        f"flow_shift={shift}",
        f"initial_latents={path}",
        f"video={files / 'video'}",
        f"strength={strength}",
    )
    figure = psnr(ours, theirs)
    print(f"video to video, strength {strength}: {figure:.1f} dB")
    assert figure > 60


FACE = 32


@pytest.fixture(scope="session")
def animate_pipeline(random_checkpoint, tmp_path_factory):
    """The random checkpoint with an Animate transformer and a CLIP tower, saved; the reference's pipeline of it."""
    folder = tmp_path_factory.mktemp("animate") / "checkpoint"
    base = diffusers.WanPipeline.from_pretrained(random_checkpoint, torch_dtype=torch.float32)
    torch.manual_seed(0)
    transformer = diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=4,
        ffn_dim=32,
        text_dim=32,
        freq_dim=64,
        image_dim=16,
        added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 6, "32": 4},
        motion_encoder_size=FACE,
        motion_style_dim=10,
        motion_dim=5,
        motion_encoder_dim=14,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = transformers.CLIPVisionConfig(**tower, image_size=28, patch_size=14, hidden_act="gelu")
    pipeline = diffusers.WanAnimatePipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=base.vae,
        scheduler=base.scheduler,
        image_processor=transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28),
        image_encoder=transformers.CLIPVisionModel(clip).eval(),
        transformer=transformer.eval(),
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return folder, pipeline


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "length", "carried", "frames", "scale"), [("animate", 9, 1, 15, 1.0), ("replace", 13, 5, 18, 3.0)]
)
def test_animate_equals_the_reference(animate_pipeline, files, tmp_path, mode, length, carried, frames, scale):
    """Two segments, the second filled up behind the video's end; without guidance, and with it."""
    checkpoint, pipeline = animate_pipeline
    segments = Segments(frames, length, carried).starts
    assert len(segments) == 2
    shape = (1, 16, (length - 1) // 4 + 2, HEIGHT // 8, WIDTH // 8)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.cat([torch.randn(shape, generator=generator) for _ in segments], dim=2)
    save_latents(tmp_path / "noise.safetensors", drawn.permute(0, 2, 3, 4, 1).numpy(), {})
    rng = np.random.default_rng(6)
    videos = {}
    for name, size in (
        ("pose", (HEIGHT, WIDTH)),
        ("face", (FACE, FACE)),
        ("background", (80, 120)),
        ("mask", (80, 120)),
    ):
        small = [Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)) for _ in range(frames)]
        videos[f"{name}_video"] = [image.resize(size[::-1], Image.Resampling.BICUBIC) for image in small]
        write(np.stack([np.asarray(image) for image in videos[f"{name}_video"]]), tmp_path / name, 16, "png", {})
    used = ("pose", "face") if mode == "animate" else ("pose", "face", "background", "mask")
    theirs = pipeline(
        image=Image.open(files / "1.png"),
        **{f"{name}_video": videos[f"{name}_video"] for name in used},
        prompt=PROMPT,
        negative_prompt="blurry",
        mode=mode,
        height=HEIGHT,
        width=WIDTH,
        segment_frame_length=length,
        prev_segment_conditioning_frames=carried,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    assert theirs.std() > 0.02 and len(theirs) == frames
    ours = run(
        tmp_path,
        "model_name=wan2.2-animate",
        f"pretrained_model_name_or_path={checkpoint}",
        f"image={files / '1.png'}",
        *(f"{name}_video={tmp_path / name}" for name in used),
        f"mode={mode}",
        f"flow_shift={pipeline.scheduler.config.flow_shift}",
        f"initial_latents={tmp_path / 'noise.safetensors'}",
        f"segment_frame_length={length}",
        f"prev_segment_conditioning_frames={carried}",
        num_frames=frames,
        guidance_scale=scale,
    )
    figure = psnr(ours, np.round(theirs * 255).astype(np.uint8))
    print(f"Animate, {mode}, {len(segments)} segments: {figure:.1f} dB")
    assert figure > 60


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vace", "t2v", "animate"])
def test_tokens_that_do_not_divide_eight_devices_change_nothing(request, files, tmp_path, task):
    """48 x 80 pixels are 15 tokens a latent frame; over ring 4 x ulysses 2."""
    video = f"video={files / 'video'}"
    if task == "vace":
        checkpoint = request.getfixturevalue("vace_checkpoint")
        words = ["model_name=wan2.1-vace", video, f"mask={files / 'mask'}", f"reference_images={files / '0.png'}"]
    elif task == "t2v":
        checkpoint, words = request.getfixturevalue("random_checkpoint"), ["model_name=wan2.1-t2v", video]
    else:
        checkpoint, _ = request.getfixturevalue("animate_pipeline")
        faces = np.random.default_rng(0).integers(0, 256, (FRAMES, FACE, FACE, 3), dtype=np.uint8)
        write(faces, tmp_path / "face", 16, "png", {})
        acting = [f"pose_video={files / 'video'}", f"face_video={tmp_path / 'face'}", f"image={files / '1.png'}"]
        words = ["model_name=wan2.2-animate", "segment_frame_length=5", *acting]
    words = [*words, f"pretrained_model_name_or_path={checkpoint}", "flow_shift=3"]
    alone = ("attention=dot_product", "ici_data_parallelism=-1", "ici_context_parallelism=1")
    split = ("attention=ulysses_ring", "ulysses_shards=2", "ici_context_parallelism=8")
    one, eight = (run(tmp_path, *words, *mesh, size=(48, 80)) for mesh in (alone, split))
    figure = psnr(one, eight)
    print(f"{task} on eight devices: {figure:.1f} dB")
    assert one.std() > 5
    assert figure > 60


@pytest.mark.slow
@pytest.mark.parametrize("task", ["t2v", "vace", "animate"])
def test_the_sound_of_an_input_is_kept_in_time(request, tmp_path, task):
    """A clip of 24 frames per second whose sound begins a quarter of a second after its pictures."""
    clip, image = tmp_path / "clip.mp4", tmp_path / "image.png"
    picture = f"testsrc=size={WIDTH}x{HEIGHT}:rate=24:duration=1"
    beep = "aevalsrc=0.5*sin(880*PI*t)*gt(t\\,0.25):duration=1"
    ffmpeg("-f", "lavfi", "-i", picture, "-f", "lavfi", "-i", beep, "-pix_fmt", "yuv420p", clip)
    if task == "animate":
        checkpoint, _ = request.getfixturevalue("animate_pipeline")
        write(np.zeros((FRAMES, FACE, FACE, 3), np.uint8), tmp_path / "face", 16, "png", {})
        Image.new("RGB", (WIDTH, HEIGHT), "red").save(image)
        words = ["model_name=wan2.2-animate", "segment_frame_length=5", f"image={image}", f"pose_video={clip}"]
        words += [f"face_video={tmp_path / 'face'}"]
    else:
        checkpoint = request.getfixturevalue({"t2v": "random_checkpoint", "vace": "vace_checkpoint"}[task])
        words = [f"model_name=wan2.1-{task}", f"video={clip}", "input_frames=timed"]
    words += [f"pretrained_model_name_or_path={checkpoint}", "flow_shift=3", "keep_audio=true", "fps=16"]
    video = made(tmp_path, *words, save="ours.mp4", guidance_scale=1.0)
    sound = read_samples(str(video), 16000)
    assert len(read_video(video)) == FRAMES and abs(sound.seconds - FRAMES / 16) < 0.05
    assert abs(np.argmax(np.abs(sound.values) > 0.1) / 16000 - 0.25) < 0.01
