"""`compare`: the miniature's video exactly and with a cache."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from maxdiffusion import comparison
from maxdiffusion.errors import UserError
from maxdiffusion.media.similarity import psnr, ssim
from maxdiffusion.request import load
from tests.support.videos import CONFIGS

WORDS = [str(CONFIGS / "wan_tiny.yml"), "prompt=a red circle", "log_level=error", "jax_cache_dir=", "num_frames=5"]


@pytest.mark.slow
def test_a_variant_beside_the_exact_video(tmp_path, capsys):
    words = [*WORDS, f"output_dir={tmp_path}", "num_inference_steps=10", "compare=[cache=taylor cache_max_skips=2]"]
    exact, fast = comparison.run(load(words))
    assert (exact.name, exact.psnr) == ("exact", math.inf) and exact.ssim > 0.9999
    assert fast.calls < exact.calls and 10 < fast.psnr < 100 and fast.ssim < 1
    assert "PSNR" in capsys.readouterr().out
    (folder,) = tmp_path.rglob("*.compare")
    names = {"exact", "cache-taylor-cache_max_skips-2"}
    assert {path.stem for path in folder.glob("*.mp4")} == {*names, "compare"}
    with Image.open(folder / "compare.jpg") as picture:
        assert picture.height % 3 == 0
    record = json.loads((folder / "cache-taylor-cache_max_skips-2.json").read_text())
    assert fast.calls == sum(map(len, record["cache"]["computed"][0].values()))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("compare=[prompt=x]", "cannot change prompt"),
        ("compare=[cache=mag]", "no published ratios"),
        ("compare=[cash=mag]", "cash"),
    ],
)
def test_variants_are_checked_before_anything_runs(tmp_path, word, message):
    with pytest.raises(UserError, match=message):
        load([*WORDS, f"output_dir={tmp_path}", word])


def test_similarity_of_frames():
    frames = np.random.default_rng(0).integers(0, 200, (2, 32, 48, 3)).astype(np.uint8)
    assert psnr(frames, frames) == math.inf and ssim(frames, frames) == 1
    assert abs(psnr(frames, frames + 16) - 20 * math.log10(255 / 16)) < 1e-3
    assert 0 < ssim(frames, frames[::-1]) < 0.5
