"""The miniature with linear layers in 8 bits: near the exact video, on every mesh, and said in the log."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.videos import made, psnr

STEPS = "num_inference_steps=4"
ONE = ("attention=dot_product", "ici_data_parallelism=-1", "ici_context_parallelism=1")
MESH = ("attention=ulysses_ring", "ulysses_shards=2", "ici_fsdp_parallelism=2", "ici_tensor_parallelism=2")


def video(folder: Path, *words: str) -> np.ndarray:
    (one,) = made(folder, STEPS, *words)
    return one


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> np.ndarray:
    return video(tmp_path_factory.mktemp("exact"), *ONE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [("auto", 40), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("int8", 35), ("fp8", 30)))],
)
def test_the_video_is_near_the_exact_one(tmp_path, exact, capsys, name, least):
    capsys.readouterr()
    (got,) = made(tmp_path, STEPS, *ONE, f"quantization={name}", quiet=("output_format=npy", "jax_cache_dir="))
    said, figure = capsys.readouterr().err, psnr(got, exact)
    print(f"quantization={name}: {figure:.1f} dB")
    assert figure > least
    dtype = "float8_e4m3fn" if name == "fp8" else "int8"
    assert re.search(rf"quantization={name}: {dtype} weights", said)
    assert f"transformer: 60 linear layers in {dtype}; " in said  # six layers of ten
    assert ("s8 x s8 -> s32" in said) == (name == "int8")


@pytest.mark.slow
def test_the_same_video_on_a_mesh(tmp_path):
    one, mesh = (video(tmp_path / str(len(words)), *words, "quantization=int8") for words in (ONE, MESH))
    figure = psnr(mesh, one)
    print(f"fsdp 2, tensor 2, Ulysses 2 in int8: {figure:.1f} dB")
    assert figure > 45


@pytest.mark.slow
def test_queries_and_keys_in_8_bits(tmp_path, exact, capsys):
    capsys.readouterr()
    figure = psnr(video(tmp_path, *ONE, "attention_quantization=fp8"), exact)
    print(f"attention_quantization=fp8: {figure:.1f} dB")
    assert 30 < figure < 100
