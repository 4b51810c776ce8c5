"""Files for a net: what they hold instead of it or beside it, and the names of llama.cpp."""

import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from maxdiffusion import request
from maxdiffusion.errors import UserError
from maxdiffusion.variants import VARIANTS
from maxdiffusion.weights import net_file
from maxdiffusion.weights.checkpoint import open_checkpoint
from maxdiffusion.weights.tables import original
from tests.support import gguf_file
from tests.support.gguf_file import Kind
from tests.support.safetensors_file import original_name, write

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "wan_tiny"
PREFIXES = {
    "comfyui": {
        "transformer": "model.diffusion_model.",
        "vae": "vae.",
        "text_encoder": "text_encoders.umt5xxl.transformer.",
    },
    "older": {
        "transformer": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.umt5xxl.transformer.",
    },
}


def stored(net):
    (path,) = (MODEL / net).glob("*.safetensors")
    return load_file(path)


def numbers(tensors):
    return {name: tensor.rows(0, tensor.shape[0] if tensor.shape else 1) for name, tensor in tensors.items()}


def same(got, want):
    assert got.keys() == want.keys()
    for name, array in numbers(got).items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)


@pytest.mark.parametrize("spelling", PREFIXES)
def test_each_part_of_a_whole_pipeline(tmp_path, caplog, spelling):
    prefixes, path = PREFIXES[spelling], tmp_path / "all.safetensors"
    parts = {net: stored(net) for net in prefixes}
    extra = {"text_encoders.umt5xxl.logit_scale": np.float32([1]), "text_encoders.spiece_model": np.zeros(9, np.uint8)}
    write(path, {prefixes[net] + name: array for net, part in parts.items() for name, array in part.items()} | extra)
    for net, part in parts.items():
        tensors, left = net_file.read(path, net)
        same({name: tensors[name] for name in part}, part)
        assert {*tensors} - {*part} == ({"logit_scale", "spiece_model"} if net == "text_encoder" else set())
        assert len(left) == 2 and sum(left.values()) + len(tensors) == sum(map(len, parts.values())) + len(extra)
    with caplog.at_level(logging.INFO):
        opened = open_checkpoint(MODEL, VARIANTS["wan-tiny-t2v"], files={"vae": path})
    assert "used for the VAE alone; left: transformer (" in caplog.text
    assert opened.nets["vae"].left.keys() == {"transformer", "text encoder"}
    with pytest.raises(
        UserError, match=r"image_encoder_file=.*holds the weights of the transformer, not of the image encoder"
    ):
        net_file.read(path, "image_encoder")


@pytest.mark.parametrize("prefix", ["model.", "module.", "diffusion_model.", "module.model."])
@pytest.mark.parametrize("net", ["transformer", "vae"])
def test_a_prefix_of_all_names(tmp_path, net, prefix):
    write(tmp_path / "a.safetensors", {prefix + name: array for name, array in stored(net).items()})
    same(net_file.read(tmp_path / "a.safetensors", net)[0], stored(net))


@pytest.mark.parametrize(
    "net, wrong, message",
    [
        (
            "vae",
            "transformer",
            r"vae_file=.* the weights of the transformer, not of the VAE; give it as transformer_file=.*a\.",
        ),
        (
            "transformer_2",
            "text_encoder",
            r"transformer_2_file=.* of the text encoder, .* give it as text_encoder_file=",
        ),
        ("text_encoder", "vae", r"text_encoder_file=.* of the VAE, not of the text encoder; give it as vae_file="),
    ],
)
def test_another_net(tmp_path, net, wrong, message):
    write(tmp_path / "a.safetensors", stored(wrong))
    with pytest.raises(UserError, match=message) as error:
        request.load([str(ROOT / "configs" / "wan_tiny.yml"), f"{net}_file={tmp_path}/a.safetensors"])
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "names, message",
    [
        (["transformer.blocks.0.attn1.to_q.lora_A.weight"], r"is a LoRA, .*; give it as lora=.*a\.safetensors"),
        (["lora_unet_blocks_0_ffn_0.lora_down.weight", "lora_unet_blocks_0_ffn_0.alpha"], "is a LoRA"),
        (["diffusion_model.patch_embedding.diff"], "is a LoRA"),
        (
            ["a", "b", "c", "d"],
            r"holds 4 tensors \(a, b, c, \.\.\.\), which are not those of a WAN VAE; give the file of",
        ),
        ([], "holds 0 tensors"),
    ],
)
def test_no_net(tmp_path, names, message):
    write(tmp_path / "a.safetensors", dict.fromkeys(names, np.zeros(2, np.float32)))
    with pytest.raises(UserError, match=rf"vae_file=.*{message}"):
        net_file.read(tmp_path / "a.safetensors", "vae")


def test_no_file(tmp_path):
    with pytest.raises(
        UserError, match=r"transformer_file=.*x does not exist; give the path of a \.safetensors or \.gguf"
    ):
        request.load([str(ROOT / "configs" / "wan_tiny.yml"), f"transformer_file={tmp_path}/x"])


def test_a_vae_of_another_family(tmp_path):
    arrays = stored("vae")
    arrays["decoder.conv_in.weight"] = np.zeros((8, 48, 3, 3, 3), np.float32)
    write(tmp_path / "a.safetensors", arrays)
    with pytest.raises(
        UserError, match=r"vae_file=.* VAE of 48 latent channels and this model has \d+; .*Wan2\.2 for 48"
    ):
        open_checkpoint(MODEL, VARIANTS["wan-tiny-t2v"], files={"vae": tmp_path / "a.safetensors"})


def test_the_names_of_llama_cpp_are_those_of_its_library(tmp_path):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 40)
    arrays = {name: np.float32(array) for name, array in stored("text_encoder").items()}
    arrays.pop("encoder.embed_tokens.weight", None)
    theirs = {names.get_name(name, try_suffixes=(".weight",)): (array, Kind.F32) for name, array in arrays.items()}
    assert all(original_name(name, original.GGUF_UMT5)[0] in theirs for name in arrays)
    gguf_file.write(tmp_path / "umt5.gguf", theirs, "t5encoder")
    same(net_file.read(tmp_path / "umt5.gguf", "text_encoder")[0], arrays)
