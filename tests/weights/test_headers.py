"""Headers of safetensors files: what the format's own library wrote, and damaged ones."""

import json
import os
import re
import shlex
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from maxdiffusion.errors import UserError
from maxdiffusion.weights.headers import read_header, read_json, read_tensors
from tests.support import synthetic


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


HEADER_FAULTS = {
    "absent": (lambda p: None, "does not exist"),
    "empty": (lambda p: p.write_bytes(b""), "neither a safetensors nor a GGUF file"),
    "short": (lambda p: p.write_bytes(b"\x10\0\0"), "neither a safetensors nor a GGUF file"),
    "a folder": (lambda p: p.mkdir(), "cannot be read"),
    "git-lfs pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git-lfs pointer.*lfs pull",
    ),
    "html": (lambda p: p.write_text("<!doctype html><html>rate limit</html>"), "neither a safetensors nor a GGUF file"),
    "pickle": (lambda p: p.write_bytes(b"PK\x03\x04" + b"\0" * 100), "torch pickle.*convert it.*save_file"),
    "pickle of old": (lambda p: p.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j"), "torch pickle"),
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


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_command_that_converts_a_pickle(tmp_path, suffix):
    path = tmp_path / f"Wan2.1_VAE{suffix}"
    torch.save({"w": torch.arange(6.0).reshape(2, 3).T}, path)
    with pytest.raises(UserError) as error:
        read_tensors(path)
    _, *words = shlex.split(re.search(r"python -c .*", str(error.value))[0])
    subprocess.run([sys.executable, *words], check=True)
    tensors = read_tensors(tmp_path / "Wan2.1_VAE_converted.safetensors")
    np.testing.assert_array_equal(tensors["w"].rows(0, 3), [[0, 3], [1, 4], [2, 5]])


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    for read in (read_header, read_json):
        with pytest.raises(UserError, match="neither a file nor a folder but a pipe"):
            read(tmp_path / "a.safetensors")


def test_a_truncated_file_of_a_hubs_cache_is_named_where_it_lies(tmp_path):
    write(tmp_path / "blob", entry(), bytes(7))
    (tmp_path / "a.safetensors").symlink_to("blob")
    with pytest.raises(UserError, match=f"is truncated.*; delete {re.escape(str(tmp_path / 'blob'))} and download"):
        read_header(tmp_path / "a.safetensors")
