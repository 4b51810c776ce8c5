"""Single files in the original naming, as community checkpoints ship, in place of a net of the diffusers folder."""

import functools
import json
import runpy
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from maxdiffusion import request
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.request import nets
from maxdiffusion.weights import dimensions, loader, mapping, naming, net_file
from maxdiffusion.weights.checkpoint import NETS, open_checkpoint
from maxdiffusion.weights.nets import builders
from maxdiffusion.weights.tables import original
from tests.support.safetensors_file import original_name, write

ROOT = Path(__file__).parents[2]
TABLES = {"transformer": original.DIT, "text_encoder": original.UMT5, "vae": original.VAE21}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    script = runpy.run_path(str(ROOT / "scripts" / "make_random_checkpoint.py"))
    script["main"]([str(folder), "--preset", "tiny"])
    return folder


def stored_in(folder):
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


def renamed(arrays, table, prefix=""):
    return {prefix + original_name(name, table)[0]: array for name, array in arrays.items()}


@functools.cache
def abstract(net, dtype, config):
    build = builders(AttentionPlan(), weights_dtype=dtype, dtype=dtype, vae_dtype=dtype)
    return build[net](config)


def load(folder, net, files=None, dtype=jnp.float32):
    """What `Nets` does for one of its nets; the same abstract one for all tests."""
    opened, spec = open_checkpoint(folder, files=files).nets[net], NETS[net]
    module = abstract(net, dtype, opened.config)
    what = str(opened.path)
    assignments = mapping.match(opened.tensors, spec.rules, module, what=what, ignored=spec.ignored)
    loaded = loader.materialize(module, assignments)
    return {path: np.asarray(param.get_value()) for path, param in mapping.parameters(loaded).items()}


def same(got, want):
    assert got.keys() == want.keys()
    for path, array in got.items():
        assert array.dtype == want[path].dtype
        np.testing.assert_array_equal(array, want[path], err_msg=path)


@pytest.mark.parametrize(
    "net, kind",
    [
        ("transformer", ml_dtypes.bfloat16),
        ("transformer", np.float16),
        ("text_encoder", np.float32),
        ("vae", np.float32),
    ],
)
def test_both_namings_give_the_same_parameters(checkpoint, tmp_path, net, kind):
    arrays = {name: array.astype(kind) for name, array in stored_in(checkpoint / net).items()}
    prefix = "model.diffusion_model." if net == "transformer" else ""
    write(tmp_path / "diffusers.safetensors", arrays)
    write(tmp_path / "original.safetensors", renamed(arrays, TABLES[net], prefix))
    want = load(checkpoint, net, {net: tmp_path / "diffusers.safetensors"}, jnp.bfloat16)
    same(load(checkpoint, net, {net: tmp_path / "original.safetensors"}, jnp.bfloat16), want)


def test_both_namings_of_the_image_encoder_give_the_same_parameters(tmp_path):
    """The original file joins q, k and v, has the singleton axes of its modules, and holds the rest of the CLIP."""
    raw = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, patch_size=14)
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**raw, image_size=28, hidden_act="gelu"))
    stored = {name.removeprefix("vision_model."): array.numpy() for name, array in tower.state_dict().items()}
    write(tmp_path / "diffusers.safetensors", stored)
    joined = {}
    for name, array in stored.items():
        joined.setdefault(original_name(name, original.CLIP)[0], []).append((name, array))
    order = {f"{part}_proj": i for i, part in enumerate("qkv")}
    theirs = {}
    for name, parts in joined.items():
        assert len(parts) == (3 if ".to_qkv." in name else 1)
        parts.sort(key=lambda part: order.get(part[0].split(".")[-2], 0))
        theirs[name] = np.concatenate([array for _, array in parts])
    for name in ("visual.cls_embedding", "visual.pos_embedding"):
        theirs[name] = theirs[name].reshape(1, -1, raw["hidden_size"])
    rest = {"visual.head": (24, 8), "textual.token_embedding.weight": (9, 4), "log_scale": ()}
    write(tmp_path / "original.safetensors", theirs | {name: np.zeros(shape, "f4") for name, shape in rest.items()})

    net = NETS["image_encoder"]
    module = abstract("image_encoder", jnp.float32, net.parse(raw | {"image_size": 28, "hidden_act": "gelu"}))
    loaded = []
    for file in ("diffusers", "original"):
        tensors = net_file.read(tmp_path / f"{file}.safetensors", "image_encoder")[0]
        assert naming.is_original(tensors) == (file == "original")
        assignments = mapping.match(tensors, net.rules, module, what=file, ignored=net.ignored)
        params = mapping.parameters(loader.materialize(module, assignments))
        loaded.append({path: np.asarray(param.get_value()) for path, param in params.items()})
    same(*loaded)


def test_the_file_wins_over_the_folder_whose_weights_are_not_needed(checkpoint, tmp_path):
    want = load(checkpoint, "transformer", None, jnp.bfloat16)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    write(tmp_path / "dit.safetensors", renamed(stored_in(checkpoint / "transformer"), original.DIT))
    for path in (folder / "transformer").glob("*.safetensors"):
        path.unlink()
    same(load(folder, "transformer", {"transformer": tmp_path / "dit.safetensors"}, jnp.bfloat16), want)


@pytest.mark.parametrize("by_row", [False, True])
def test_scaled_fp8_is_dequantised_as_it_was_quantised(checkpoint, tmp_path, by_row):
    """Weights of the blocks' linear layers in fp8 with their scales, the rest in fp16, as such files are made."""
    arrays, expected = {}, {}
    for name, array in stored_in(checkpoint / "transformer").items():
        theirs = f"model.diffusion_model.{original_name(name, original.DIT)[0]}"
        if name.endswith(".weight") and (".ffn.net.2." in name or ".attn1.to_" in name):
            scale = np.abs(array).max(axis=1, keepdims=True) / 448 if by_row else np.float32(np.abs(array).max() / 448)
            arrays[theirs] = (array / scale).astype(ml_dtypes.float8_e4m3fn)
            arrays[theirs.removesuffix("weight") + "scale_weight"] = scale
            arrays[theirs.removesuffix("weight") + "scale_input"] = np.float32(1)
            expected[name] = arrays[theirs].astype(np.float32) * scale
        else:
            expected[name] = arrays[theirs] = array.astype(np.float16)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    arrays["model.diffusion_model.scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    write(tmp_path / "fp8.safetensors", arrays)
    write(tmp_path / "plain.safetensors", {name: array.astype(np.float32) for name, array in expected.items()})
    got = load(checkpoint, "transformer", {"transformer": tmp_path / "fp8.safetensors"}, jnp.bfloat16)
    same(got, load(checkpoint, "transformer", {"transformer": tmp_path / "plain.safetensors"}, jnp.bfloat16))


def test_the_text_encoder_of_comfyui_carries_its_tokenizer(checkpoint, tmp_path):
    stored = stored_in(checkpoint / "text_encoder")
    write(tmp_path / "umt5.safetensors", {**stored, "spiece_model": np.zeros(9, np.uint8)})
    same(
        load(checkpoint, "text_encoder", {"text_encoder": tmp_path / "umt5.safetensors"}, jnp.bfloat16),
        load(checkpoint, "text_encoder", None, jnp.bfloat16),
    )


def test_missing_and_foreign_tensors_are_named(checkpoint, tmp_path):
    stored = renamed(stored_in(checkpoint / "transformer"), original.DIT)
    del stored["blocks.1.self_attn.q.weight"]
    write(tmp_path / "dit.safetensors", {**stored, "stray.weight": np.zeros(3, np.float32)})
    with pytest.raises(
        UserError,
        match=r"dit\.safetensors do not fit.*1 missing from the checkpoint: blocks\.1\.attn1\.to_q\.weight; "
        r"1 not a part of the model: stray\.weight",
    ):
        load(checkpoint, "transformer", {"transformer": tmp_path / "dit.safetensors"}, jnp.bfloat16)


# ---- what the tensors tell about the network


def test_dimensions_are_those_of_the_config(checkpoint):
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    told = dimensions.read_config(checkpoint / "transformer", {"attention_head_dim": 12})
    assert told.items() <= (config | {"patch_size": [1, 2, 2]}).items()
    assert {"num_layers", "num_attention_heads", "ffn_dim", "in_channels", "out_channels", "text_dim"} <= told.keys()


def test_a_file_for_a_net_that_the_model_lacks(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"image_encoder_file=x is not used by a model without image_encoder"):
        open_checkpoint(checkpoint, files={"image_encoder": Path("x")})


def test_a_file_of_another_net(checkpoint, tmp_path):
    write(tmp_path / "vae.safetensors", renamed(stored_in(checkpoint / "vae"), original.VAE21))
    with pytest.raises(
        UserError,
        match=r"transformer_file=.*holds the weights of the VAE, not of the transformer; give it as vae_file=",
    ):
        dimensions.read_config(tmp_path / "vae.safetensors", {})


@pytest.mark.parametrize(("module", "kind"), [("control_adapter.conv", "Fun-Camera"), ("ref_conv", "Fun-Control")])
def test_modules_of_videox_fun_that_are_not_computed_are_named(checkpoint, module, kind):
    shapes = {key: array.shape for key, array in stored_in(checkpoint / "transformer").items()}
    with pytest.raises(
        UserError, match=rf"x is a transformer of {kind}, .* is not computed here; give one of VACE-Fun"
    ):
        dimensions.transformer_config(shapes | {f"{module}.weight": (24, 16, 2, 2)}, {}, "x")


@pytest.mark.parametrize("name", ["patch_embedding.weight", "proj_out.weight", "blocks.0.ffn.net.0.proj.weight"])
def test_a_tensor_of_another_rank_is_one_sentence(checkpoint, name):
    shapes = {key: array.shape for key, array in stored_in(checkpoint / "transformer").items()}
    with pytest.raises(UserError, match=rf"x stores {name} with shape \[7\], which has \d axes"):
        dimensions.transformer_config(shapes | {name: (7,)}, {}, "x")


def test_a_part_of_a_vace_file_leaves_its_faults_to_the_match(checkpoint):
    shapes = {key: array.shape for key, array in stored_in(checkpoint / "transformer").items()}
    shapes |= {"vace_blocks.9.norm.weight": (1,), "vace_patch_embedding.weight": (8, 8, 1, 2, 2)}
    assert len(dimensions.transformer_config(shapes, {}, "x")["vace_layers"]) < 9


# ---- the config


def written(tmp_path, checkpoint, **lines):
    page = tmp_path / "page.yml"
    lines = {"prompt": "a cat", "pretrained_model_name_or_path": str(checkpoint), "output_dir": str(tmp_path), **lines}
    page.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return [str(page)]


def test_the_file_tells_the_variant(tmp_path):
    shapes = {
        "patch_embedding.weight": (5120, 16, 1, 2, 2),
        "text_embedding.0.weight": (5120, 4096),
        "time_embedding.0.weight": (5120, 256),
        "head.head.weight": (64, 5120),
        **{f"blocks.{i}.ffn.0.weight": (13824, 5120) for i in range(40)},
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / "14b.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # a hole: nothing is stored
    page = written(tmp_path, "Wan-AI/Wan2.1-T2V-14B-Diffusers")
    cfg = request.load([*page, f"transformer_file={tmp_path}/14b.safetensors"]).cfg
    assert cfg.model_name == "wan2.1-t2v-14b"
    assert cfg.origins["model_name"].endswith("14b.safetensors")


def test_paths_of_weight_files(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"vae_file=.*nowhere\.safetensors does not exist"):
        request.load([*written(tmp_path, checkpoint), "vae_file=nowhere.safetensors"])
    write(tmp_path / "dit.safetensors", renamed(stored_in(checkpoint / "transformer"), original.DIT))
    with pytest.raises(UserError, match=r"is a file; .*as transformer_file=.*dit\.safetensors"):
        request.load(written(tmp_path, tmp_path / "dit.safetensors"))
    job = request.load(written(tmp_path, checkpoint, transformer_file="./dit.safetensors"))
    assert job.cfg.transformer_file == str(tmp_path / "dit.safetensors")
    assert nets.open_checkpoint(job).configs["transformer"].attention_head_dim == 12


def test_official_repositories_and_pickles(checkpoint, tmp_path):
    official = tmp_path / "Wan2.1-T2V-1.3B"
    official.mkdir()
    (official / "Wan2.1_VAE.pth").write_bytes(b"PK")
    write(
        official / "diffusion_pytorch_model.safetensors", renamed(stored_in(checkpoint / "transformer"), original.DIT)
    )
    sentence = rf"own layout, with torch pickles \(Wan2\.1_VAE\.pth\).*transformer_file={official}\."
    with pytest.raises(UserError, match=sentence):
        request.load(written(tmp_path, official))
    with pytest.raises(UserError, match=sentence):
        open_checkpoint(official)
    with pytest.raises(UserError, match=r"Wan2\.1_VAE\.pth is a torch pickle.*convert it once"):
        open_checkpoint(checkpoint, files={"vae": official / "Wan2.1_VAE.pth"})
    assert len(open_checkpoint(checkpoint, files={"transformer": official}).nets["transformer"].tensors) > 50
