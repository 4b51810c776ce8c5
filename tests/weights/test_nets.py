"""The nets of a text-to-video pipeline from a folder that the reference's own classes describe."""

import gzip
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from maxdiffusion.attention import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.weights import mapping, specs
from maxdiffusion.weights.checkpoint import TensorInfo
from maxdiffusion.weights.nets import Nets, build_abstractly, builders

ROOT = Path(__file__).parents[2]
NETS = ("text_encoder", "transformer", "vae")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random one, several shards to each net."""
    folder = tmp_path_factory.mktemp("checkpoint")
    script = runpy.run_path(str(ROOT / "scripts" / "make_random_checkpoint.py"))
    script["main"]([str(folder), "--preset", "tiny", "--shard-gb", "1e-4"])
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def nets(folder, weights_dtype=jnp.float32, **options):
    build = builders(AttentionPlan(), weights_dtype=weights_dtype, dtype=jnp.float32, **options)
    return Nets(specs.open_pipeline(folder), build)


def relative(got, want):
    got, want = np.asarray(got, np.float64), want.detach().double().numpy()
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def test_transformer_computes_what_the_reference_does(checkpoint):
    ours = nets(checkpoint).load("transformer")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
    rng = np.random.default_rng(0)
    x, text = rng.standard_normal((1, 2, 4, 6, 16), np.float32), rng.standard_normal((1, 7, 32), np.float32)
    got = ours(jnp.asarray(x), jnp.array([500.0]), jnp.asarray(text))
    with torch.no_grad():
        want = theirs(
            torch.from_numpy(x).permute(0, 4, 1, 2, 3), torch.tensor([500.0]), torch.from_numpy(text)
        ).sample.permute(0, 2, 3, 4, 1)
    assert relative(got, want) < 1e-4


def test_text_encoder_computes_what_the_reference_does(checkpoint):
    ours = nets(checkpoint).load("text_encoder")
    theirs = transformers.UMT5EncoderModel.from_pretrained(checkpoint / "text_encoder").eval()
    ids = np.arange(3, 12)[None]
    got = ours(jnp.asarray(ids, jnp.int32), jnp.ones(ids.shape, bool))
    with torch.no_grad():
        want = theirs(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.long)).last_hidden_state
    assert relative(got, want) < 1e-4


def test_vae_computes_what_the_reference_does(checkpoint):
    ours = nets(checkpoint).load("vae")
    theirs = diffusers.AutoencoderKLWan.from_pretrained(checkpoint / "vae")
    video = np.random.default_rng(0).uniform(-1, 1, (1, 5, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        want = theirs.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist.mode()
    mean, std = (torch.tensor(theirs.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    assert relative(ours.encode(jnp.asarray(video)), ((want - mean) / std).permute(0, 2, 3, 4, 1)) < 1e-4


def test_dtypes_and_progress(checkpoint):
    loaded = nets(checkpoint, jnp.bfloat16)
    for name in NETS:
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
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    stored = {}
    for path in (copy / "transformer").glob("*.safetensors"):
        stored |= load_file(path)
        path.unlink()
    stored |= {f"blocks.{i}.attn2.norm_added_q.weight": torch.ones(24) for i in range(2)}
    save_file(stored, copy / "transformer" / "diffusion_pytorch_model.safetensors")
    nets(copy)


def test_opening_does_not_import_jax(checkpoint):
    code = (
        "import sys, pathlib; from maxdiffusion.weights import specs\n"
        "pipeline = specs.open_pipeline(pathlib.Path(sys.argv[1]))\n"
        "print(pipeline.configs['transformer'].num_layers, sorted({'jax', 'numpy', 'torch'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True)
    assert run.stdout == "2 []\n", run.stderr


OFFICIAL = {
    "wan2.1-t2v-1.3b": ("transformer", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}),
    "wan2.1-t2v-14b": ("transformer", {}),
    "wan2.1-vae": ("vae", {}),
    "umt5-xxl-encoder": (
        "text_encoder",
        {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384},
    ),
}
DEFAULTS = {
    "transformer": lambda: dict(diffusers.WanTransformer3DModel().config),
    "vae": lambda: dict(diffusers.AutoencoderKLWan().config),
    "text_encoder": lambda: transformers.UMT5Config(feed_forward_proj="gated-gelu").to_dict(),
}


@pytest.mark.parametrize("manifest", OFFICIAL)
def test_official_checkpoints_map_whole(manifest):
    """Names and shapes of the official files; no weight is allocated."""
    name, changes = OFFICIAL[manifest]
    with torch.device("meta"):
        raw = DEFAULTS[name]() | changes
    spec = next(spec for spec in specs.TEXT_TO_VIDEO if spec.folder == name)
    build = builders(AttentionPlan(), weights_dtype=jnp.bfloat16, dtype=jnp.bfloat16)[name]
    abstract = build_abstractly(build, spec.parse(raw))
    shapes = json.loads(gzip.decompress((ROOT / "tests" / "golden" / "manifests" / f"{manifest}.json.gz").read_bytes()))
    tensors = {key: TensorInfo(key, "F32", tuple(shape), Path("x"), 0) for key, shape in shapes.items()}
    pieces = mapping.match(tensors, spec.rules, abstract, what=manifest, ignored=spec.ignored)
    used = [tensor.name for found in pieces.values() for piece in found for tensor in (piece.tensor, *piece.copies)]
    assert sorted(used) == sorted(shapes)
