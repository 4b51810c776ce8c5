"""The control of VACE against diffusers' WanVACEPipeline, on a random VAE."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from maxdiffusion.conditioning import vace
from maxdiffusion.conditioning.vace import control_latents
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
        references,
    )
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4)


def test_a_cut_out_stands_on_white(tmp_path):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, :8] = (200, 30, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "cut-out.png")
    words = ["prompt=a cat", "size=64*64", "num_frames=1", f"output_dir={tmp_path}"]
    job = load(["configs/wan2.1_vace_1.3b.yml", *words, f"reference_images={tmp_path / 'cut-out.png'}"])
    (reference,) = vace.read(job, {}).references
    assert reference[8, 12].tolist() == [255] * 3 and reference[8, 4].tolist() == [200, 30, 30]
