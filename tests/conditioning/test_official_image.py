"""Images from disk as the official code sees them: the start frame of each task, and CLIP's tokens."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from maxdiffusion import request
from maxdiffusion.conditioning import image
from maxdiffusion.config import Config
from maxdiffusion.media.fetch import open_image
from maxdiffusion.request import Job, Segments, Video
from maxdiffusion.request.session import opened
from maxdiffusion.variants import get
from tests.support import official
from tests.support.parity import relative_error
from tests.support.pictures import picture
from tests.support.start_image import encoded

FP32 = [f"{part}_dtype=float32" for part in ("weights", "activations", "text_encoder")]
FILES = [("wide.png", (300, 171)), ("tall.jpg", (211, 333)), ("square.png", (64, 64)), ("large.jpg", (900, 1210))]


def loaded(model, *words):
    """A run by a page whose words are these."""
    return request.load(["base.yml", f"model_name={model}", "prompt=a", "jax_cache_dir=", *FP32, *words])


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yml").write_text("{}\n")


@pytest.mark.parametrize(
    ("name", "size", "area"),
    [*((*file, (320, 192)) for file in FILES), ("exact.png", (416, 240), (832, 480))],  # the last becomes 832 x 464
)
@pytest.mark.parametrize(
    ("task", "model", "tolerance"), [("i2v", "wan2.2-i2v-a14b", 1e-5), ("ti2v", "wan2.2-ti2v-5b", 1e-6)]
)
def test_the_start_frame(tmp_path, task, model, tolerance, name, size, area):
    """Its size as well as its pixels."""
    at = picture(tmp_path, name, size)
    theirs = encoded(task, Image.open(at).convert("RGB"), area[0] * area[1])
    job = loaded(model, f"image={at}", f"size={area[0]}*{area[1]}")
    read = {"i2v": image.read_ends, "ti2v": image.read_first}[task]
    (ours,) = read(job, {at: open_image(at)}).values()
    np.testing.assert_allclose(ours, theirs, atol=tolerance)


def fitted(own, size, **keys):
    """The start frame of an image of that size, whose value grows from left to right and from top to bottom."""
    ramp = np.add.outer(np.linspace(0, 100, own[1]), np.linspace(0, 100, own[0])).round()
    pixels = Image.fromarray(np.repeat(ramp.astype(np.uint8)[..., None], 3, axis=-1))
    video = Video("a", "", 0, *size, image="a")
    job = Job(Config.model_construct(**keys), get("wan2.1-flf2v-14b"), (video,), Segments(5, 5))
    (frame,) = image.read_ends(job, {"a": pixels}).values()
    return frame, torch.from_numpy(np.asarray(pixels) / np.float32(127.5) - 1)


def test_an_image_of_other_proportions_is_cropped(caplog):
    """As a last image of another shape than the first, or by an exact size."""
    with caplog.at_level("INFO", "maxdiffusion"):
        frame, own = fitted((128, 128), (96, 32))
    whole = torch.nn.functional.interpolate(own.permute(2, 0, 1)[None], (96, 96), mode="bicubic")[0]
    np.testing.assert_allclose(frame, whole[:, 32:64].permute(1, 2, 0), atol=1e-5)
    assert "image a: 128 x 128 pixels, made 96 x 96, cropped to 96 x 32" in caplog.text


@pytest.mark.parametrize(("own", "squashed"), [((109, 80), True), ((84, 80), True), ((120, 80), False)])
def test_an_image_that_rounding_alone_distorts_is_squashed(caplog, own, squashed):
    """96 x 80 in multiples of 16 stands for widths from 96 to 112 and heights from 80 to 96."""
    with caplog.at_level("INFO", "maxdiffusion"):
        frame, _ = fitted(own, (96, 80))
    assert frame.shape == (80, 96, 3)
    assert ("cropped" in caplog.text) is not squashed


def test_diffusers_start_image_is_resized_by_pil():
    frame, _ = fitted((109, 80), (96, 80), conventions="diffusers")
    levels = (frame + 1) * 127.5
    np.testing.assert_allclose(levels, levels.round(), atol=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The transformer is diffusers', as wan22 has none of 2.1; it is not loaded."""
    folder = official.write_checkpoint(tmp_path_factory.mktemp("official"), "wan2.1-i2v", transformers={})
    sizes = dict(num_layers=1, num_attention_heads=1, attention_head_dim=12, ffn_dim=16, text_dim=32)
    transformer = diffusers.WanTransformer3DModel(
        **sizes, in_channels=36, out_channels=16, image_dim=1280, added_kv_proj_dim=12
    )
    transformer.save_pretrained(folder / "transformer")
    return folder


def test_tokens_of_clip(tmp_path, checkpoint):
    """Of the whole image in its own proportions."""
    files = [picture(tmp_path, name, size, seed) for seed, (name, size) in enumerate(FILES[:2])]
    words = [word for word in official.words(checkpoint) if not word.startswith("transformer_file")]
    job = loaded("wan2.1-i2v", f"image={files!r}", "width=64", "height=64", *words)
    with opened(job) as s:
        ours = image.encode_tokens(s, image.read_originals(job, {at: open_image(at) for at in files}))
    to_tensor = official.load("image2video").TF.to_tensor
    for at, tokens in zip(files, ours, strict=True):
        pixels = to_tensor(Image.open(at).convert("RGB")).sub_(0.5).div_(0.5)
        theirs = official.clip(checkpoint).visual([pixels[:, None]])[0]
        assert relative_error(tokens, theirs.numpy()) < 1e-5
