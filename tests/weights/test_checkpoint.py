import json
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.weights.checkpoint import open_checkpoint, read_header, read_tensors

from . import synthetic

NETS = {"transformer": "WanTransformer3DModel", "text_encoder": "UMT5EncoderModel"}


@pytest.fixture
def folder(tmp_path):
    """A whole checkpoint of two nets: one file, three shards."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    synthetic.write_net(tmp_path / "transformer", synthetic.tensors(), shards=3)
    synthetic.write_net(tmp_path / "text_encoder", synthetic.tensors(1), stem="model")
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "WanTransformer3DModel", "num_layers": 3}')
    (tmp_path / "text_encoder" / "config.json").write_text('{"architectures": ["UMT5EncoderModel"]}')
    for name in ("tokenizer", "scheduler"):
        (tmp_path / name).mkdir()
    return tmp_path


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_headers_give_the_bytes_that_the_library_wrote(tmp_path, dtype):
    stored = synthetic.tensors(dtype=dtype) | {"scalar": np.array(2, dtype)}
    synthetic.write_net(tmp_path, stored)
    tensors = read_tensors(tmp_path)
    assert tensors.keys() == stored.keys()
    for name, tensor in tensors.items():
        data = tensor.file.read_bytes()[tensor.start : tensor.start + tensor.nbytes]
        assert tensor.shape == stored[name].shape
        assert data == stored[name].tobytes()


def test_a_whole_checkpoint(folder):
    checkpoint = open_checkpoint(folder, NETS)
    assert checkpoint.configs["transformer"]["num_layers"] == 3
    assert set(checkpoint.tensors["transformer"]) == set(synthetic.tensors())
    assert len({tensor.file for tensor in checkpoint.tensors["transformer"].values()}) == 3


def test_it_imports_neither_jax_nor_numpy():
    code = (
        "import sys, maxdiffusion.weights.checkpoint; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


HEADER_FAULTS = {
    "absent": (lambda p: None, "does not exist"),
    "empty": (lambda p: p.write_bytes(b""), "no safetensors file"),
    "short": (lambda p: p.write_bytes(b"\x10\0\0"), "no safetensors file"),
    "a folder": (lambda p: p.mkdir(), "cannot be read"),
    "git-lfs pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git-lfs pointer.*lfs pull",
    ),
    "html": (lambda p: p.write_text("<!doctype html><html>rate limit</html>"), "no safetensors file"),
    "pickle": (lambda p: p.write_bytes(b"PK\x03\x04" + b"\0" * 100), "no safetensors file"),
    "cut in the header": (lambda p: p.write_bytes(struct.pack("<Q", 500) + b'{"w": '), "cut off within its header"),
    "not JSON": (lambda p: write(p, b'{"w": {"dtype"'), "damaged safetensors header"),
    "not UTF-8": (lambda p: write(p, b'{"\xff": 1}'), "damaged safetensors header"),
    "no offsets": (lambda p: write(p, {"w": {"dtype": "F32", "shape": [2]}}, b"\0" * 8), "damaged.*data_offsets"),
    "not an object": (lambda p: write(p, {"w": 3}), "damaged"),
    "no shape": (lambda p: write(p, entry(shape="ab"), b"\0" * 8), "damaged"),
    "wrong offsets": (lambda p: write(p, entry(offsets=(0, 4)), b"\0" * 4), "damaged.*do not hold"),
    "negative offsets": (lambda p: write(p, entry(offsets=(-8, 0))), "damaged"),
    "negative shape": (lambda p: write(p, entry(shape=(-2, -1)), b"\0" * 8), "damaged"),
    "offsets that are no integers": (lambda p: write(p, entry(offsets=(0.0, 8.0)), b"\0" * 8), "natural numbers"),
    "a shape that is no integer": (lambda p: write(p, entry(shape=(2.0,)), b"\0" * 8), "natural numbers"),
    "a shape of text": (lambda p: write(p, entry(shape=("2",)), b"\0" * 8), "natural numbers"),
    "overlapping tensors": (
        lambda p: write(p, {**entry(), "v": entry()["w"]}, b"\0" * 8),
        "v does not begin where the tensor before it ends",
    ),
    "a gap": (lambda p: write(p, entry(offsets=(8, 16)), b"\0" * 16), "w does not begin where"),
    "nested too deep": (lambda p: write(p, b'{"w": ' + b"[" * 100_000), "damaged.*recursion"),
    "unknown dtype": (lambda p: write(p, entry("F4"), b"\0" * 8), "'w' as F4, an unknown dtype.*F32, BF16 or F16"),
    "truncated": (lambda p: write(p, entry(), b"\0" * 7), r"truncated: it has \d+ bytes and its header asks for \d+"),
    "too long": (lambda p: write(p, entry(), b"\0" * 9), "unknown bytes"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_damaged_file(tmp_path, fault):
    path = tmp_path / "w.safetensors"
    damage, message = HEADER_FAULTS[fault]
    damage(path)
    with pytest.raises(UserError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def shard(folder, i):
    return folder / "transformer" / f"diffusion_pytorch_model-{i:05}-of-00003.safetensors"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def index(folder):
    return folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"


def remove(folder, name):
    for path in (folder / name).iterdir():
        path.unlink()
    (folder / name).rmdir()


FOLDER_FAULTS = {
    "no model_index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "other pipeline": (lambda f: edit(f / "model_index.json", lambda c: c.update(_class_name="FluxPipeline")), "Flux"),
    "model_index is a list": (lambda f: (f / "model_index.json").write_text("[]"), "JSON list, not an object"),
    "no net": (lambda f: remove(f, "transformer"), "no folder 'transformer'"),
    "no tokenizer": (lambda f: remove(f, "tokenizer"), "no folder 'tokenizer'"),
    "no config": (lambda f: (f / "transformer/config.json").unlink(), r"config\.json does not exist"),
    "config cut": (lambda f: (f / "transformer/config.json").write_text('{"a"'), "not valid JSON"),
    "config nested too deep": (
        lambda f: (f / "transformer/config.json").write_text('{"a": ' + "[" * 100_000),
        "not valid JSON.*recursion",
    ),
    "model_index nested too deep": (lambda f: (f / "model_index.json").write_text("[" * 100_000), "not valid JSON"),
    "shard of another folder": (
        lambda f: edit(index(f), lambda c: c["weight_map"].update(ghost="../text_encoder/model.safetensors")),
        r"\.\./text_encoder/model\.safetensors is absent",
    ),
    "shard of a long name": (
        lambda f: edit(index(f), lambda c: c["weight_map"].update(ghost="x" * 300)),
        "x{300} is absent",
    ),
    "config is no text": (lambda f: (f / "transformer/config.json").write_bytes(b"\xff\xfe{"), "not valid JSON"),
    "other net": (
        lambda f: edit(f / "transformer/config.json", lambda c: c.update(_class_name="WanVACETransformer3DModel")),
        "'WanVACETransformer3DModel', and this command runs WanTransformer3DModel",
    ),
    "no class": (lambda f: (f / "text_encoder/config.json").write_text("{}"), "None, and this command runs UMT5"),
    "no weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), "holds no .*safetensors"),
    "pickle only": (
        lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.bin"),
        r"it has pytorch_model\.bin",
    ),
    "two of them": (lambda f: synthetic.write_net(f / "transformer", synthetic.tensors()), "unclear which"),
    "no shard": (lambda f: shard(f, 2).unlink(), "lists 3 files, of which .*-00002-of-00003.safetensors is absent"),
    "two shards absent": (lambda f: (shard(f, 2).unlink(), shard(f, 3).unlink()), "are absent"),
    "shard cut": (lambda f: shard(f, 1).write_bytes(shard(f, 1).read_bytes()[:-1]), "00001.*truncated"),
    "index without map": (lambda f: index(f).write_text("{}"), "no `weight_map`"),
    "index with a strange map": (lambda f: index(f).write_text('{"weight_map": {"a": 1}}'), "no `weight_map`"),
    "tensor not in its shard": (
        lambda f: edit(index(f), lambda c: c["weight_map"].update(ghost=shard(f, 1).name)),
        "disagree about 1 tensors: ghost",
    ),
    "tensor not in the index": (
        lambda f: edit(index(f), lambda c: c["weight_map"].pop("patch.bias")),
        r"disagree about 1 tensors: patch\.bias",
    ),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_incomplete_checkpoint(folder, fault):
    damage, message = FOLDER_FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(folder, NETS)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        open_checkpoint(tmp_path / "nowhere", NETS)
