"""Every naming convention of LoRA files against diffusers' `load_lora_weights` and `fuse_lora`."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from maxdiffusion.weights.lora.file import read
from maxdiffusion.weights.lora.merge import merge
from tests.support import lora
from tests.support.lora import assert_close, numbers, opened

RANK, ALPHA = 4, 2


def flat(name):
    return name.replace(".", "_")


PAIRS = {  # suffixes of (down, up)
    "A, B": (".lora_A.weight", ".lora_B.weight"),
    "A, B bare": (".lora_A", ".lora_B"),
    "A, B of a slot": (".lora_A.default.weight", ".lora_B.default.weight"),
    "A, B of another slot": (".lora_A.my_style.weight", ".lora_B.my_style.weight"),
    "down, up": (".lora_down.weight", ".lora_up.weight"),
    "_lora": ("_lora.down.weight", "_lora.up.weight"),
    ".lora": (".lora.down.weight", ".lora.up.weight"),
    "linear": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}
# name: (of a module from its names in diffusers and in the original, suffixes)
FORMS = {
    "a diffusers": (lambda ours, theirs: f"transformer.{ours}", "A, B"),
    "b peft": (lambda ours, theirs: f"base_model.model.{theirs}", "A, B of a slot"),
    "b peft, nested": (lambda ours, theirs: f"peft_model.base_model.model.{ours}", "A, B of another slot"),
    "c diffusion-pipe": (lambda ours, theirs: f"diffusion_model.{theirs}", "A, B"),
    "d LightX2V": (lambda ours, theirs: f"diffusion_model.{theirs}", "down, up"),
    "e musubi": (lambda ours, theirs: f"lora_unet_{flat(theirs)}", "down, up"),
    "f VideoX-Fun": (lambda ours, theirs: f"lora_unet__{flat(theirs)}", "down, up"),
    "g mixed": (lambda ours, theirs: f"lora_unet_{theirs.replace('.', '_', 1)}", "down, up"),
    "h ai-toolkit": (lambda ours, theirs: f"lycoris_{flat(ours)}", "down, up"),
    "i DiffSynth": (lambda ours, theirs: f"pipe.dit.{theirs}", "A, B of a slot"),
    "i bare": (lambda ours, theirs: theirs, "A, B"),
    "j finetrainers": (lambda ours, theirs: f"diffusion_model.{ours}", "A, B"),
    "k model": (lambda ours, theirs: f"model.{theirs}", "_lora"),
    "k unet": (lambda ours, theirs: f"unet.{ours}", ".lora"),
    "k linear": (lambda ours, theirs: f"model.diffusion_model.{theirs}", "linear"),
    "k without .weight": (lambda ours, theirs: f"diffusion_model.{theirs}", "A, B bare"),
}
READ_BY_DIFFUSERS = ("a diffusers", "c diffusion-pipe", "d LightX2V", "e musubi")
BLOCKS_ALONE = ("e musubi",)


def write(path, form, net, alpha=None, others=True, dtype=np.float32, rank=RANK, seed=0):
    """A file of that form for every linear layer, with alpha tensors of the given array."""
    called, suffixes = FORMS[form]
    modules = lora.modules(2, others)
    made = lora.factors({name: t.shape for name, t in net.tensors.items()}, [ours for ours, _ in modules], rank, seed)
    tensors = {}
    for ours, theirs in modules:
        for suffix, factor in zip(PAIRS[suffixes], made[ours], strict=True):
            tensors[called(ours, theirs) + suffix] = factor.astype(dtype)
        if alpha is not None:
            tensors[f"{called(ours, theirs)}.alpha"] = alpha
    return lora.write(path, tensors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [None, np.array(ALPHA, np.float32)], ids=["no alpha", "alpha"])
def test_every_form_gives_the_weights_of_diffusers(plain, tmp_path, merged, fused, form, alpha):
    """Of its own form where diffusers reads it; else of form a, with alpha folded into the factors."""
    net = opened(plain)
    others = form not in BLOCKS_ALONE
    file = write(tmp_path / "a.safetensors", form, net, alpha, others)
    ours = merged(plain, {file: 0.7})
    # It drops alpha outside the blocks, and needs one of musubi's files.
    own = form in READ_BY_DIFFUSERS and (alpha is None) == (form not in BLOCKS_ALONE)
    strength = 0.7 if own or alpha is None else 0.7 * ALPHA / RANK
    there = file if own else write(tmp_path / "b.safetensors", "a diffusers", net, None, others)
    reference = fused(plain, {there: strength})
    assert_close(ours, reference)
    before = numbers(net)
    changed = {name for name, array in ours.items() if not np.array_equal(array, before[name])}
    assert changed == {f"{name}.weight" for name, _ in lora.modules(2, others)}


@pytest.mark.parametrize(
    "alpha", [np.array(ALPHA, kind) for kind in (np.int64, np.int32, np.float64, np.float16, ml_dtypes.bfloat16)]
)
def test_alpha_of_every_dtype(plain, tmp_path, merged, alpha):
    net = opened(plain)
    scaled = merged(plain, {write(tmp_path / "a.safetensors", "d LightX2V", net, alpha): 1.0})
    halved = merged(plain, {write(tmp_path / "b.safetensors", "d LightX2V", net): ALPHA / RANK})
    assert_close(scaled, halved, 1e-6)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_several_files_add_with_their_strengths(plain, tmp_path, merged, fused, dtype):
    net = opened(plain)
    first = write(tmp_path / "a.safetensors", "a diffusers", net, dtype=dtype)
    second = write(tmp_path / "b.safetensors", "c diffusion-pipe", net, dtype=dtype, rank=3, seed=1)
    for strengths in ((1, 1), (0.3, -0.8), (-1.5, 2)):
        files = dict(zip((first, second), map(float, strengths), strict=True))
        assert_close(merged(plain, files), fused(plain, files))


def test_biases_as_diffusers_reads_them(plain, tmp_path, merged, fused):
    net, rng = opened(plain), np.random.default_rng(3)
    file = write(tmp_path / "a.safetensors", "d LightX2V", net)
    tensors = load_file(file)
    for ours, theirs in lora.modules(2):
        tensors[f"diffusion_model.{theirs}.diff_b"] = rng.normal(size=net.tensors[f"{ours}.bias"].shape).astype("f4")
    file = lora.write(tmp_path / "b.safetensors", tensors)
    assert_close(merged(plain, {file: 0.5}), fused(plain, {file: 0.5}))


def test_image_modules(with_image, plain, tmp_path, merged, fused):
    """k_img, v_img and img_emb where the model has them, and one number in the log where it has not."""
    net = opened(with_image)
    names = [("attn2.add_k_proj", "cross_attn.k_img"), ("attn2.add_v_proj", "cross_attn.v_img")]
    modules = [(f"blocks.{i}.{ours}", f"blocks.{i}.{theirs}") for i in range(2) for ours, theirs in names]
    image = "condition_embedder.image_embedder"
    modules += [(f"{image}.ff.net.0.proj", "img_emb.proj.1"), (f"{image}.ff.net.2", "img_emb.proj.3")]
    modules += lora.modules(2)
    made = lora.factors({name: t.shape for name, t in net.tensors.items()}, [ours for ours, _ in modules])
    tensors = {
        f"diffusion_model.{theirs}.{part}.weight": factor
        for ours, theirs in modules
        for part, factor in zip(("lora_down", "lora_up"), made[ours], strict=True)
    }
    file = lora.write(tmp_path / "a.safetensors", tensors)
    assert_close(merged(with_image, {file: 1.0}), fused(with_image, {file: 1.0}))
    tensors |= {"diffusion_model.blocks.0.cross_attn.norm_k_img.diff": np.zeros(24, np.float32)}
    tensors |= {f"diffusion_model.img_emb.proj.{i}.diff_b": np.zeros(20, np.float32) for i in (0, 4)}
    base = opened(plain)
    _, own = merge(base.tensors, base.config, read(lora.write(tmp_path / "b.safetensors", tensors)), 1.0)
    assert "26 of 35 modules" in str(own) and "the other 9 are for image tokens, which this model has not" in str(own)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_metadata_of_diffusers(plain, tmp_path, merged, fused, rank_stabilized):
    """lora_adapter_metadata, with patterns of ranks and alphas."""
    net = opened(plain)
    content = {"r": RANK, "lora_alpha": 6, "use_rslora": rank_stabilized, "target_modules": ["to_q"]}
    content |= {"alpha_pattern": {"blocks.1.attn1.to_q": 3}, "rank_pattern": {"blocks.1.attn1.to_k": 2}}
    file = write(tmp_path / "a.safetensors", "a diffusers", net)
    tensors = load_file(file)
    key = "transformer.blocks.1.attn1.to_k"
    tensors[f"{key}.lora_A.weight"] = tensors[f"{key}.lora_A.weight"][:2]
    tensors[f"{key}.lora_B.weight"] = tensors[f"{key}.lora_B.weight"][:, :2]
    content["target_modules"] = [name for name, _ in lora.modules(2)]
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in content.items()})}
    file = lora.write(file, tensors, {"format": "pt", **header})
    assert_close(merged(plain, {file: 1.0}), fused(plain, {file: 1.0}))
