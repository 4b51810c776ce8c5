"""The control of VACE against diffusers' WanVACEPipeline, on a random VAE."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from maxdiffusion.conditioning import vace
from maxdiffusion.conditioning.vace import control_latents, on_canvas
from maxdiffusion.media.frames import to_float
from maxdiffusion.request import load
from tests.support.vae import Pair

HEIGHT, WIDTH, FRAMES = 32, 48, 9


@pytest.fixture(scope="module")
def vae():
    return Pair()


def frames(seed, count, height, width):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def pil(video):
    return [Image.fromarray(frame) for frame in video]


@pytest.mark.parametrize(
    ("given", "sizes"), [("nothing", [(40, 40)]), ("video", []), ("video and mask", [(40, 40), (70, 21)])]
)
def test_matches_the_reference(vae, given, sizes):
    video, mask = (frames(seed, FRAMES, HEIGHT, WIDTH) for seed in (0, 1))
    references = [frames(2, 1, *size)[0] for size in sizes]
    transformer = diffusers.WanVACETransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8, vace_layers=[0]
    )
    pipeline = diffusers.WanVACEPipeline(None, None, vae.torch, None, transformer)
    with torch.no_grad():
        conditions = pipeline.preprocess_conditions(
            pil(video) if given != "nothing" else None,
            pil(mask) if given == "video and mask" else None,
            pil(references) or None,
            1,
            HEIGHT,
            WIDTH,
            FRAMES,
            torch.float32,
            "cpu",
        )
        latents = pipeline.prepare_video_latents(*conditions, device="cpu")
        theirs = torch.cat([latents, pipeline.prepare_masks(*conditions[1:])], dim=1)[0].permute(1, 2, 3, 0).numpy()
    shape = (FRAMES, HEIGHT, WIDTH, 3)
    ours = control_latents(
        vae.ours,
        to_float(video, HEIGHT, WIDTH) if given != "nothing" else np.zeros(shape, np.float32),
        (to_float(mask, HEIGHT, WIDTH) + 1) / 2 if given == "video and mask" else np.ones(shape, np.float32),
        [np.asarray(on_canvas(image, HEIGHT, WIDTH, 8)) for image in reversed(references)],
    )
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4)


@pytest.mark.parametrize("own", [(40, 40), (70, 21), (32, 48), (9, 100)])
def test_a_reference_is_scaled_from_its_own_size_as_in_the_official_code(own):
    """`WanVace.prepare_source` written out: nothing is rounded to the VAE's stride first."""
    image = frames(3, 1, *own)[0]
    scale = min(HEIGHT / own[0], WIDTH / own[1])
    h, w = int(own[0] * scale), int(own[1] * scale)
    given = torch.from_numpy(image).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
    theirs = np.ones((HEIGHT, WIDTH, 3), np.float32)
    top, left = (HEIGHT - h) // 2, (WIDTH - w) // 2
    small = torch.nn.functional.interpolate(given[None], (h, w), mode="bilinear", align_corners=False)[0]
    theirs[top : top + h, left : left + w] = small.permute(1, 2, 0)
    np.testing.assert_allclose(on_canvas(image, HEIGHT, WIDTH, 1), theirs, atol=1e-5)


def test_a_cut_out_stands_on_white(tmp_path):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, :8] = (200, 30, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "cut-out.png")
    words = ["prompt=a cat", "size=64*64", "num_frames=1", f"output_dir={tmp_path}"]
    job = load(["configs/wan2.1_vace_1.3b.yml", *words, f"reference_images={tmp_path / 'cut-out.png'}"])
    (reference,) = vace.read(job, {}).references
    assert reference[32, 48].tolist() == [1] * 3
    np.testing.assert_allclose(reference[32, 16], np.array([200, 30, 30]) / 127.5 - 1, atol=1e-6)
