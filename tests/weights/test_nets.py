"""The nets of a text-to-video pipeline from a folder that the reference's own classes describe."""

import dataclasses
import gc
import gzip
import json
import re
import runpy
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.variants import get
from maxdiffusion.weights import mapping, naming, net_file, official
from maxdiffusion.weights.checkpoint import NETS, open_checkpoint
from maxdiffusion.weights.nets import Nets, builders
from maxdiffusion.weights.sources import stored
from tests.support import parity

ROOT = Path(__file__).parents[2]
TEXT_TO_VIDEO = ("text_encoder", "transformer", "vae")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random one, several shards to each net."""
    folder = tmp_path_factory.mktemp("checkpoint")
    script = runpy.run_path(str(ROOT / "scripts" / "make_random_checkpoint.py"))
    script["main"]([str(folder), "--preset", "tiny", "--shard-gb", "5e-5"])
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def build(weights_dtype):
    return builders(AttentionPlan(), weights_dtype=weights_dtype, dtype=jnp.float32)


def nets(folder, weights_dtype=jnp.float32):
    return Nets(open_checkpoint(folder), build(weights_dtype))


@pytest.fixture(scope="module")
def whole(checkpoint):
    return nets(checkpoint)


def stored_in(folder):
    """Every tensor of a net's folder, by the format's own library."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", TEXT_TO_VIDEO)
def test_every_parameter_is_what_the_parity_tests_fill_in(whole, checkpoint, name):
    """Those copy a state dict by code of their own; with it each net computes what the reference does."""
    net = build(jnp.float32)[name](open_checkpoint(checkpoint).configs[name])
    want = parity.load_state_dict(net, NETS[name].rules, stored_in(checkpoint / name))
    want = {path: param.get_value() for path, param in mapping.parameters(want).items()}
    got = {path: param.get_value() for path, param in mapping.parameters(whole.load(name)).items()}
    assert got.keys() == want.keys()
    for path, array in got.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(want[path]), err_msg=path)


def test_the_reference_reads_the_same_folder(checkpoint):
    pipeline = diffusers.WanPipeline.from_pretrained(checkpoint)
    for name in TEXT_TO_VIDEO:
        theirs = getattr(pipeline, name).state_dict()
        for key, tensor in stored_in(checkpoint / name).items():
            assert torch.equal(theirs[key], tensor), key


def test_a_dropped_net_is_freed_before_the_next_is_loaded(whole):
    gc.disable()  # so that nothing but `load` can have done it
    try:
        array = weakref.ref(whole.load("vae").quant_conv.kernel.get_value())
        at_next = []
        whole.load("vae", lambda nbytes: at_next.append(array() is None))
        assert all(at_next)
    finally:
        gc.enable()


def test_dtypes_and_progress(checkpoint):
    loaded = nets(checkpoint, jnp.bfloat16)
    for name in TEXT_TO_VIDEO:
        read = []
        net = loaded.load(name, read.append)
        assert sum(read) == loaded.nbytes_on_disk(name)
        for path, param in mapping.parameters(net).items():
            assert isinstance(param.get_value(), jax.Array), path
        dtypes = {path: param.dtype for path, param in mapping.parameters(net).items()}
        if name == "vae":
            assert set(dtypes.values()) == {jnp.dtype(jnp.float32)}
        if name == "transformer":
            assert dtypes["blocks.attn1.to_q.kernel"] == jnp.bfloat16
            assert dtypes["blocks.attn1.norm_q.scale"] == dtypes["blocks.scale_shift_table"] == jnp.float32


def test_every_net_is_matched_before_one_is_loaded(copy):
    path = next(path for path in (copy / "vae").glob("*.safetensors") if "decoder.conv_in.weight" in load_file(path))
    stored = load_file(path)
    stored["decoder.conv_in.weight"] = stored["decoder.conv_in.weight"][..., :1].contiguous()
    save_file(stored, path)
    with pytest.raises(UserError, match=r"vae.*stored as 32x16x3x3x1 instead of 32x16x3x3x3: decoder\.conv_in\.weight"):
        nets(copy)


def test_config_and_weights_of_two_checkpoints(copy):
    path = copy / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 3}))
    with pytest.raises(UserError, match=r"missing from the checkpoint: .*blocks\.2\.attn1\.to_q\.weight"):
        nets(copy)


def test_unused_norms_of_the_official_files_are_accepted(copy):
    stored = stored_in(copy / "transformer")
    stored |= {f"blocks.{i}.attn2.norm_added_q.weight": torch.ones(24) for i in range(2)}
    for path in (copy / "transformer").glob("*.safetensors*"):
        path.unlink()
    save_file(stored, copy / "transformer" / "diffusion_pytorch_model.safetensors")
    nets(copy)


def test_opening_does_not_import_jax(checkpoint):
    code = (
        "import sys, pathlib; from maxdiffusion.weights.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint(pathlib.Path(sys.argv[1]))\n"
        "print(checkpoint.configs['transformer'].num_layers, sorted({'jax', 'numpy', 'torch'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True)
    assert run.stdout == "2 []\n", run.stderr


# manifest -> a variant and a net of it
OFFICIAL = {
    "wan2.1-t2v-1.3b": ("wan2.1-t2v-1.3b", "transformer"),
    "wan2.1-t2v-14b": ("wan2.1-t2v-14b", "transformer"),
    "wan2.1-i2v-14b": ("wan2.1-i2v-14b-720p", "transformer"),
    "wan2.1-flf2v-14b": ("wan2.1-flf2v-14b", "transformer"),
    "wan2.2-t2v-a14b": ("wan2.2-t2v-a14b", "transformer_2"),
    "wan2.2-i2v-a14b": ("wan2.2-i2v-a14b", "transformer_2"),
    "wan2.2-ti2v-5b": ("wan2.2-ti2v-5b", "transformer"),
    "wan2.1-vace-1.3b": ("wan2.1-vace-1.3b", "transformer"),
    "wan2.1-vace-14b": ("wan2.1-vace-14b", "transformer"),
    "wan2.2-animate-14b": ("wan2.2-animate-14b", "transformer"),
    "wan2.2-animate2-14b": ("wan2.2-animate2-14b", "transformer"),  # of diffusers' class
    "wan2.1-vae": ("wan2.1-t2v-14b", "vae"),
    "wan2.2-vae": ("wan2.2-ti2v-5b", "vae"),
    "clip-vit-h-14": ("wan2.1-i2v-14b-480p", "image_encoder"),
    "umt5-xxl-encoder": ("wan2.1-t2v-14b", "text_encoder"),
    "wan2.2-s2v-14b": ("wan2.2-s2v-14b", "transformer"),  # by its official names
    "wav2vec2-large-xlsr-53": ("wan2.2-s2v-14b", "audio_encoder"),
}


@pytest.mark.parametrize("manifest", OFFICIAL)
def test_official_checkpoints_map_whole(manifest):
    """Names and shapes of the official files; no weight is allocated."""
    variant, name = OFFICIAL[manifest]
    spec = NETS[name]
    abstract = build(jnp.bfloat16)[name](official.configs(get(variant))[name])
    shapes = json.loads(gzip.decompress((ROOT / "tests" / "golden" / "manifests" / f"{manifest}.json.gz").read_bytes()))
    tensors = {key: stored(key, "F32", tuple(shape), Path("x"), 0) for key, shape in shapes.items()}
    if "s2v" in manifest or "animate2" in manifest:
        tensors = naming.normalised(tensors, net_file.KINDS[name].original)
    found = mapping.match(tensors, spec.rules, abstract, what=manifest, ignored=spec.ignored)
    used = [tensor.name for slots in found.values() for slot in slots for tensor in (slot.tensor, *slot.copies)]
    unused = [key for key in shapes if any(re.fullmatch(pattern, key) for pattern in spec.ignored)]
    assert sorted(used + unused) == sorted(shapes)


def test_official_configs_are_the_defaults_of_the_references_classes():
    """What shapes do not show: heads, patches, epsilons."""
    with torch.device("meta"):
        theirs = {"transformer": diffusers.WanTransformer3DModel(), "vae": diffusers.AutoencoderKLWan()}
    for name, reference in theirs.items():
        want = NETS[name].parse(dict(reference.config))
        got = official.configs(get("wan2.1-t2v-14b"))[name]
        numbers = {key: getattr(got, key) for key in ("latents_mean", "latents_std") if hasattr(got, key)}
        assert got == dataclasses.replace(want, **numbers)
