"""Files that are refused, each in one sentence, from their headers and alphas; NaN when a file is read once."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.weights.lora.file import read
from maxdiffusion.weights.lora.merge import merge
from tests.support import lora
from tests.support.lora import opened

Q = "diffusion_model.blocks.0.self_attn.q"


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def pair(module=Q, rank=4, out=24, width=24, names=("lora_down", "lora_up")):
    return {f"{module}.{names[0]}.weight": zeros(rank, width), f"{module}.{names[1]}.weight": zeros(out, rank)}


GOOD = pair()
OTHER = pair("diffusion_model.blocks.1.self_attn.q")
HEADER = "lora_adapter_metadata"


def meta(**content):
    return {HEADER: json.dumps({f"transformer.{key}": value for key, value in content.items()})}


BAD = {  # what: (tensors, metadata, a part of the sentence)
    "nothing": ({}, {}, "none of its 0 tensors"),
    "another kind of model": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": zeros(4, 4)},
        {},
        "not a LoRA for a WAN transformer.*double_blocks",
    ),
    "a whole transformer": ({"blocks.0.self_attn.q.weight": zeros(24, 24)}, {}, "whole weights.*transformer_file"),
    "a whole transformer of diffusers": ({"blocks.0.attn1.to_q.weight": zeros(24, 24)}, {}, "transformer_file"),
    "1.3B": (pair(out=1536, width=1536), {}, r"1536x1536 instead of 24x24.*wan2\.1-t2v-1\.3b"),
    "14B": (pair(out=5120, width=5120), {}, r"2 layers of width 24.*wan2\.1-t2v-14b or wan2\.2-t2v-a14b"),
    "5B": (pair(out=3072, width=3072), {}, r"looks like a LoRA for wan2\.2-ti2v-5b"),
    "14B from images": (
        pair(out=5120, width=5120) | pair("blocks.0.cross_attn.k_img", out=5120, width=5120),
        {},
        r"wan2\.1-i2v-14b-480p or ",
    ),
    "an unknown width": (pair(out=2000, width=2000), {}, "a model of width 2000 with 1 or more layers"),
    "more layers": (pair("blocks.39.self_attn.q"), {}, r"modules that it has not: blocks\.39\.attn1\.to_q"),
    "VACE's blocks": (pair("vace_blocks.0.self_attn.q"), {}, r"modules that it has not: vace_blocks\.0"),
    "VACE's blocks by layer": (GOOD | pair("blocks.0.vace.self_attn.q"), {}, r"of unknown names: blocks\.0\.vace"),
    "image modules alone": (pair("blocks.0.cross_attn.k_img"), {}, "only modules for image tokens"),
    "unknown module": (GOOD | pair("blocks.0.self_attn.z"), {}, "2 of unknown names: blocks.0.self_attn.z"),
    "unknown suffix": (GOOD | {f"{Q}.set_weight": zeros(24, 24)}, {}, "1 of unknown names.*set_weight"),
    "a text encoder's": (GOOD | pair("lora_te_text_model_encoder_layers_0_mlp_fc1"), {}, "2 of unknown names.*lora_te"),
    "no up": ({f"{Q}.lora_down.weight": zeros(4, 24)} | OTHER, {}, "self_attn.q has .*lora_down.weight', but no up"),
    "no down": ({f"{Q}.lora_up.weight": zeros(24, 4)}, {}, "but no down"),
    "no w2_b": (
        {f"{Q}.hada_w1_a": zeros(24, 2), f"{Q}.hada_w1_b": zeros(2, 24), f"{Q}.hada_w2_a": zeros(24, 2)},
        {},
        "but no hada_w2_b",
    ),
    "no w2": ({f"{Q}.lokr_w1": zeros(4, 4), f"{Q}.lokr_w2_b": zeros(2, 6)}, {}, "but no lokr_w2_a"),
    "alpha alone": (GOOD | {"blocks.1.ffn.0.alpha": np.float32(4)}, {}, "ffn.0.alpha' has no weights beside it"),
    "a magnitude alone": (GOOD | {"blocks.1.ffn.0.dora_scale": zeros(32, 1)}, {}, "no weights beside it"),
    "two ranks": (
        {f"{Q}.lora_down.weight": zeros(4, 24), f"{Q}.lora_up.weight": zeros(24, 8)},
        {},
        r"shapes \[24, 8\] and \[4, 24\], which cannot be multiplied",
    ),
    "rank 0": (pair(rank=0), {}, "rank 0"),
    "integers": (
        {f"{Q}.lora_down.weight": zeros(4, 24, dtype=np.int8), f"{Q}.lora_up.weight": zeros(24, 4)},
        {},
        "as I8; it must be one of",
    ),
    "two slots": (
        {f"{Q}.lora_A.{slot}.weight": zeros(4, 24) for slot in ("one", "two")}
        | {f"{Q}.lora_B.{slot}.weight": zeros(24, 4) for slot in ("one", "two")},
        {},
        "change one module .* twice",
    ),
    "one module by two names": (GOOD | pair("transformer.blocks.0.attn1.to_q"), {}, "which change one module"),
    "one module in two kinds": (GOOD | {f"{Q}.lokr_w1": zeros(4, 4), f"{Q}.lokr_w2": zeros(6, 6)}, {}, "LoKr and LoRA"),
    "a difference beside factors": (GOOD | {f"{Q}.diff": zeros(24, 24)}, {}, "mixes LoRA and a whole difference"),
    "alpha of two": (GOOD | {f"{Q}.alpha": zeros(2)}, {}, r"alpha' has shape \[2\], but alpha is one number"),
    "alpha 0": (GOOD | {f"{Q}.alpha": np.float32(0)}, {}, "is 0, which is not a positive number"),
    "alpha NaN": (GOOD | {f"{Q}.alpha": np.float32("nan")}, {}, "is nan, which is not a positive number"),
    "alpha of a negative": (GOOD | {f"{Q}.alpha": np.array(-8, np.int64)}, {}, "is -8, which is not a positive"),
    "two alphas": (
        GOOD | {f"{Q}.alpha": np.float32(4)},
        {"lora_alpha": "8"},
        "is 4 by its alpha tensor, 8 by lora_alpha in its header",
    ),
    "two alphas in the header": (
        GOOD,
        {"lora_alpha": "8", **meta(r=4, lora_alpha=4)},
        f"4 by {HEADER}.*8 by lora_alpha",
    ),
    "an alpha of words": (GOOD, {"network_alpha": "eight"}, "network_alpha in its header is 'eight'"),
    "one alpha for two ranks": (
        GOOD | pair("blocks.1.ffn.0", rank=8, out=32),
        {"network_alpha": "8"},
        "is one alpha, 8, for modules of ranks 4 and 8",
    ),
    "another rank": (GOOD, meta(r=16, lora_alpha=16), "has rank 4, but lora_adapter_metadata.* declares 16"),
    "metadata that is no JSON": (GOOD, {HEADER: "{"}, f"{HEADER} in its header is not a JSON object"),
    "metadata that is a list": (GOOD, {HEADER: "[1]"}, "is not a JSON object"),
    "patterns that are no object": (
        GOOD,
        meta(r=4, lora_alpha=4, alpha_pattern=[3]),
        "alpha_pattern.* is not an object",
    ),
    "DoRA without magnitudes": (GOOD, meta(r=4, lora_alpha=4, use_dora=True), "declares DoRA, but .* has no magnitude"),
    "a magnitude of another size": (
        GOOD | {f"{Q}.dora_scale": zeros(7)},
        {},
        r"of shape \[7\] for a weight of \[24, 24\]",
    ),
    "a bias of another size": (GOOD | {f"{Q}.diff_b": zeros(25)}, {}, "of shape 25x1 instead of 24x1"),
    "a bias that the model has not": (
        GOOD | {"blocks.0.self_attn.norm_q.diff_b": zeros(24)},
        {},
        "for a bias, which it has not",
    ),
    "a modulation of another size": (GOOD | {"blocks.0.diff_m": zeros(1, 6, 25)}, {}, "1x150 instead of 1x144"),
    "a control LoRA": (
        GOOD | pair("patch_embedding", width=32),
        {},
        "is a control LoRA: it gives patch_embedding 8 input channels in place of 4",
    ),
    "fewer channels": (GOOD | pair("patch_embedding", width=8), {}, "24x8 instead of 24x16: patch_embedding"),
}


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and text.rstrip(".").count(". ") == 0, text
    return text


@pytest.mark.parametrize("what", BAD)
def test_one_sentence(plain, tmp_path, what):
    tensors, metadata, said = BAD[what]
    tensors = {name: np.asarray(array) for name, array in tensors.items()}
    file = lora.write(tmp_path / "a.safetensors", tensors, metadata)
    net = opened(plain)
    with pytest.raises(UserError, match=said) as error:
        merge(net.tensors, net.config, read(file), 1.0)
    assert str(file) in one_sentence(error)


def test_there_are_enough_of_them():
    assert len(BAD) >= 45


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "neither a safetensors nor a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"<html>404</html>" * 9, "neither a safetensors nor a GGUF file"),
    ],
)
def test_other_files(tmp_path, content, said):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read(tmp_path / "a.safetensors")


def test_files_that_are_not_there_or_no_safetensors(tmp_path):
    for name, said in (("a.safetensors", "does not exist"), ("a.pt", "torch pickle"), (".", "is a folder")):
        with pytest.raises(UserError, match=said):
            read(tmp_path / name)
    file = lora.write(tmp_path / "a.safetensors", GOOD)
    os.truncate(file, file.stat().st_size - 40)
    with pytest.raises(UserError, match="truncated"):
        read(file)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not valid JSON"), ('{"r": 4, "lora_alpha": "x"}', "alpha of adapter")]
)
def test_a_bad_adapter_config(tmp_path, text, said):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read(lora.write(tmp_path / "a.safetensors", pair(names=("lora_A", "lora_B"))))
    read(lora.write(tmp_path / "b.safetensors", GOOD))  # not PEFT's names: the config is of another file


def test_an_adapter_config_that_contradicts_the_header(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    with pytest.raises(UserError, match=r"8 by adapter_config\.json beside it, 16 by lora_alpha in its header"):
        read(lora.write(tmp_path / "a.safetensors", pair(names=("lora_A", "lora_B")), {"lora_alpha": "16"}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(tmp_path, value):
    tensors = {name: array.copy() for name, array in GOOD.items()}
    tensors[f"{Q}.lora_up.weight"][3, 2] = value
    file = read(lora.write(tmp_path / "a.safetensors", tensors))
    with pytest.raises(UserError, match=r"NaN or infinity in .*lora_up\.weight"):
        file.digest  # noqa: B018


def test_a_digest_is_of_the_content(tmp_path):
    first = read(lora.write(tmp_path / "a.safetensors", GOOD)).digest
    assert first == read(lora.write(tmp_path / "b.safetensors", dict(reversed(GOOD.items())), {"note": "x"})).digest
    assert first != read(lora.write(tmp_path / "c.safetensors", OTHER)).digest
    changed = {name: array + 1e-7 for name, array in GOOD.items()}
    assert first != read(lora.write(tmp_path / "d.safetensors", changed)).digest
