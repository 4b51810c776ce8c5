"""Text embeddings of earlier runs: which are taken, and what makes them others."""

import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maxdiffusion import request
from maxdiffusion.conditioning import text, text_cache
from maxdiffusion.request import session

ROOT = Path(__file__).parents[2]
CIRCLE, SQUARE = "a red circle", "a blue square"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("xla")


@pytest.fixture
def encode(tmp_path, monkeypatch, compiled):
    """(prompts, words) -> their embeddings, and the networks that were loaded for them; compiled once for all tests."""
    (tmp_path / "xla").symlink_to(compiled)

    def encoded(prompts, *words, page="wan_tiny", folder=tmp_path / "xla"):
        common = ["progress=off", f"jax_cache_dir={folder}"]
        job = request.load([str(ROOT / "configs" / f"{page}.yml"), *common, *words])
        loaded = []
        load = session.Session.load
        monkeypatch.setattr(session.Session, "load", lambda s, net: loaded.append(net) or load(s, net))
        try:
            with session.opened(job, jax.devices()[:1]) as s:
                return text.encode(s, prompts), loaded
        finally:
            monkeypatch.setattr(session.Session, "load", load)

    return encoded


def test_a_prompt_is_encoded_once(encode, tmp_path, caplog):
    first, loaded = encode([CIRCLE])
    assert loaded == ["text_encoder"] and len(list((tmp_path / "text").iterdir())) == 1
    with caplog.at_level(logging.INFO):
        again, loaded = encode([CIRCLE])
    assert loaded == [] and "1 of 1 embeddings are those of earlier runs" in caplog.text
    np.testing.assert_array_equal(again[CIRCLE], first[CIRCLE])
    both, loaded = encode([SQUARE, CIRCLE])
    assert loaded == ["text_encoder"] and set(both) == {SQUARE, CIRCLE}
    assert not np.array_equal(both[SQUARE], both[CIRCLE])
    assert encode([SQUARE, CIRCLE])[1] == []


@pytest.mark.slow
def test_another_encoder_or_no_folder(encode, tmp_path):
    encode([CIRCLE])
    assert encode([CIRCLE], page="wan_tiny_i2v")[1] == []  # its text encoder is the same
    copy = shutil.copytree(ROOT / "models" / "wan_tiny", tmp_path / "copy")
    (file,) = (copy / "text_encoder").glob("*.safetensors")
    save_file({name: tensor * tensor.dtype.type(1.01) for name, tensor in load_file(file).items()}, file)
    assert encode([CIRCLE], f"ckpt_dir={copy}")[1] == ["text_encoder"]
    assert encode([CIRCLE], "text_encoder_dtype=bfloat16")[1] == ["text_encoder"]
    assert encode([CIRCLE], folder="")[1] == encode([CIRCLE], folder="")[1] == ["text_encoder"]


def test_a_damaged_file_is_written_again(encode, tmp_path):
    first, _ = encode([CIRCLE])
    (file,) = (tmp_path / "text").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    again, loaded = encode([CIRCLE])
    assert loaded == ["text_encoder"] and encode([CIRCLE])[1] == []
    np.testing.assert_array_equal(again[CIRCLE], first[CIRCLE])


def test_a_prompt_that_is_cut_is_not_kept(encode, caplog):
    long = "red " * 600
    encode([long])
    caplog.clear()
    assert encode([long])[1] == ["text_encoder"] and "are cut" in caplog.text


def test_the_folder_stays_below_its_limit(encode, tmp_path, monkeypatch):
    encode([CIRCLE])
    (file,) = (tmp_path / "text").iterdir()
    monkeypatch.setattr(text_cache, "LIMIT", file.stat().st_size + 10)
    encode([SQUARE])
    assert len(list((tmp_path / "text").iterdir())) == 1 and not file.exists()


def test_a_folder_that_cannot_be_written_is_no_fault(encode, tmp_path, caplog):
    (tmp_path / "text").write_text("")
    with caplog.at_level(logging.INFO):
        assert encode([CIRCLE])[1] == ["text_encoder"]
    assert "is not kept for later runs" in caplog.text
