"""A new variant of a known kind is a row and a page: no other file of the package knows it."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import generate_wan, request, variants

ROOT = Path(__file__).parents[1]
SIZE = {"sizes": ((64, 48),), "num_frames": 5, "num_inference_steps": 4, "fps": 8}

# A row of the table, and the words with which the script makes its checkpoint.
NEW = {
    "two experts and a boundary of its own": (
        dataclasses.replace(
            variants.get("wan2.2-t2v"), name="wan3-t2v-small", family="wan3", boundary_ratio=0.6, flow_shift=2.0, **SIZE
        ),
        ["--nets", "text_encoder", "transformer", "transformer_2", "vae"],
    ),
    "the task of another family, with one expert": (
        dataclasses.replace(
            variants.get("wan2.2-i2v"),
            name="wan3-i2v-small",
            family="wan3",
            boundary_ratio=None,
            guidance_scale_2=None,
            nets=variants.get("wan2.1-t2v").nets,
            **SIZE,
        ),
        ["--pipeline", "WanImageToVideoPipeline", "--set", "transformer.in_channels=36", "transformer.out_channels=16"],
    ),
}


first, *others = NEW


@pytest.mark.parametrize("kind", [first, *(pytest.param(each, marks=pytest.mark.slow) for each in others)])
def test_a_new_variant_is_a_row_and_a_page(tmp_path, monkeypatch, kind):
    row, words = NEW[kind]
    monkeypatch.setitem(variants.VARIANTS, row.name, row)
    script = runpy.run_path(str(ROOT / "scripts" / "make_random_checkpoint.py"))
    script["main"]([str(tmp_path / "checkpoint"), *words])
    page = tmp_path / "page.yml"
    page.write_text(
        f"model_name: {row.name}\npretrained_model_name_or_path: checkpoint\nprompt: a cat\noutput_dir: out\n"
        "output_format: npy\njax_cache_dir:\nlog_level: error\nprogress: off\n"
        + ("image: image.png\n" if "image" in row.task.needs else "")
    )
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    (made,) = generate_wan.run(request.load([str(page)]))
    video = np.load(made)
    assert video.shape == (5, 48, 64, 3) and video.std() > 0
    assert made.resolve().parent == tmp_path / "out" / row.name
    config = json.loads(made.with_suffix(".json").read_text())["config"]
    for key in ("boundary_ratio", "flow_shift", "guidance_scale", "guidance_scale_2", "model_type", "width", "height"):
        assert config[key] == getattr(row, key), key
