"""Videos from an image on disk: the whole command against `WanI2V.generate` and `WanTI2V.generate`."""

from __future__ import annotations

import pytest
from PIL import Image

from maxdiffusion import generate_wan, request
from maxdiffusion.weights.latents_io import load_latents, save_latents
from tests.support import official
from tests.support.parity import relative_error
from tests.support.pictures import picture

PROMPT = "a green square moving left"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "task", "name", "own", "area", "latents"),
    [
        ("wan2.2-i2v", "i2v-A14B", "wide.png", (90, 64), (64, 64), (16, 3, 6, 8)),  # 64 x 48, by two experts
        pytest.param(  # 64 x 96, cropped
            *("wan2.2-ti2v", "ti2v-5B", "tall.jpg", (75, 131), (64, 96), (48, 3, 6, 4)), marks=pytest.mark.slow
        ),
    ],
)
def test_latents_equal_the_official_ones(tmp_path, model, task, name, own, area, latents):
    checkpoint = official.write_checkpoint(tmp_path / "checkpoint", model)
    at = picture(tmp_path, name, own)
    scale = (2.5, 3.5) if task == "i2v-A14B" else 3.5  # of two experts: low noise, high noise
    (theirs,), _ = official.generate(
        official.pipeline(checkpoint, task),
        PROMPT,
        img=Image.open(at).convert("RGB"),
        max_area=area[0] * area[1],
        frame_num=9,
        sampling_steps=4,
        guide_scale=scale,
        n_prompt="blurry",
        seed=5,
    )
    save_latents(tmp_path / "noise.safetensors", official.noise(5, *latents)[None], {})
    (tmp_path / "run.yml").write_text("{}\n")
    words = [
        f"model_name={model}",
        *official.words(checkpoint),
        f"prompt={PROMPT}",
        "negative_prompt=blurry",
        f"image={at}",
        f"size={area[0]}*{area[1]}",
        "num_frames=9",
        "num_inference_steps=4",
        f"sample_guide_scale={list(scale) if isinstance(scale, tuple) else scale}",
        f"initial_latents={tmp_path / 'noise.safetensors'}",
        f"save_file={tmp_path / 'ours.npy'}",
        *(f"{part}_dtype=float32" for part in ("weights", "activations", "text_encoder")),
        "jax_cache_dir=",
        "log_level=error",
    ]
    generate_wan.run(request.load([str(tmp_path / "run.yml"), *words]))
    ours, _ = load_latents(tmp_path / "ours.latents.safetensors")
    assert ours[0].shape == theirs.shape
    figure = relative_error(ours[0], theirs)
    print(f"{task}: {figure:.1e}")
    assert figure < 1e-5
