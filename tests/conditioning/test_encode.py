"""What is said of inputs that a run does not use as they are."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import conditioning, request
from maxdiffusion.conditioning import text
from maxdiffusion.request.session import Session, recipe_of
from tests.support import icc

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["guidance_scale=1", "negative_prompt=blur"], True),
        (["guidance_scale=1"], False),
        (["guidance_scale=2", "negative_prompt=blur"], False),
        (["guidance_scale=1", "prompts=p.jsonl"], True),
    ],
)
def test_a_negative_prompt_that_no_step_uses_is_said(tmp_path, monkeypatch, caplog, words, said):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "a cat", "negative_prompt": "blur"}')
    run = request.load([str(CONFIGS / "wan_tiny.yml"), *words])

    class WithoutCheckpoint(Session):
        job, recipe = run, recipe_of(run)

    monkeypatch.setattr(text, "encode", lambda s, prompts: {})
    with caplog.at_level(logging.INFO):
        conditioning.encode(object.__new__(WithoutCheckpoint), conditioning.Inputs({}))
    assert ("negative_prompt is not used, as no step is guided" in caplog.text) == said


def test_the_inputs_tell_what_was_converted(tmp_path):
    red = np.full((96, 96, 4), (200, 40, 40, 255), np.uint8)
    Image.fromarray(red[..., :3]).save(tmp_path / "plain.png")
    Image.fromarray(red[..., :3]).save(tmp_path / "adobe.png", icc_profile=icc.rgb(icc.ADOBE, 563 / 256, "Adobe RGB"))
    red[:48, :, 3] = 0
    Image.fromarray(red).save(tmp_path / "cut-out.png")
    paths = [str(tmp_path / name) for name in ("plain.png", "adobe.png", "cut-out.png")]
    words = [f"image=[{', '.join(paths)}]", "prompt=a cat", f"output_dir={tmp_path}"]
    read = conditioning.read(request.load([str(CONFIGS / "wan_tiny_i2v.yml"), *words]))
    assert (
        read.record()
        == read.images
        == {
            paths[1]: {"colour": "Adobe RGB made sRGB"},
            paths[2]: {"alpha": "what is transparent shows the colours stored below it"},
        }
    )
