import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from maxdiffusion.errors import UserError
from maxdiffusion.weights.latents_io import load_latents, save_latents

LATENTS = np.arange(2 * 3 * 4 * 5 * 6, dtype=np.float32).reshape(2, 3, 4, 5, 6)  # b f h w c
META = {"seed": "7", "prompt": 'a "red" círculo\n{}'}


def test_round_trip_and_layout_on_disk(tmp_path):
    path = tmp_path / "v.latents.safetensors"
    save_latents(path, LATENTS, META)
    got, meta = load_latents(path, LATENTS.shape)
    np.testing.assert_array_equal(got, LATENTS)
    assert meta == META
    on_disk = load_file(path)["latents"]  # by the format's own library
    assert on_disk.shape == (2, 6, 3, 4, 5)
    np.testing.assert_array_equal(on_disk, LATENTS.transpose(0, 4, 1, 2, 3))
    with safe_open(path, "numpy") as file:
        assert file.metadata() == META
    assert os.listdir(tmp_path) == [path.name]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=5, max_size=5), st.dictionaries(st.text(), st.text(), max_size=3))
def test_any_shape_and_any_metadata(tmp_path_factory, shape, meta):
    path = tmp_path_factory.mktemp("l") / "x.safetensors"
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    save_latents(path, latents, meta)
    got, got_meta = load_latents(path)
    np.testing.assert_array_equal(got, latents)
    assert got_meta == meta


def test_equal_latents_and_metadata_are_equal_bytes(tmp_path):
    meta = {str(i): "x" for i in range(20)}
    for name in ("a", "b"):
        save_latents(tmp_path / name, LATENTS, meta)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"noise": LATENTS}, r"no tensor 'latents' \(only: noise\)"),
        ({"latents": LATENTS[0]}, r"b c f h w"),
        ({"latents": LATENTS.astype(np.float16)}, "as F16; save it as F32"),
        ({"latents": LATENTS[:1]}, r"\[1, 3, 4, 5, 6\].*this run needs \[2, 3, 4, 5, 6\]"),
    ],
)
def test_other_contents_are_refused(tmp_path, stored, message):
    path = tmp_path / "x.safetensors"
    save_file(stored, path)
    with pytest.raises(UserError, match=message):
        load_latents(path, (2, 4, 5, 6, 3))


@pytest.mark.parametrize("others", [("a", "z"), ("a",), ("z",)])
def test_other_tensors_may_lie_before_and_after(tmp_path, others):
    path = tmp_path / "x.safetensors"
    save_file(
        {"latents": LATENTS.transpose(0, 4, 1, 2, 3).copy(), **{name: np.ones(3, np.float32) for name in others}}, path
    )
    np.testing.assert_array_equal(load_latents(path)[0], LATENTS)


def test_a_prompt_that_is_no_utf8_is_escaped(tmp_path):
    path = tmp_path / "x.safetensors"
    save_latents(path, LATENTS, {"prompt": "caf\udce9"})
    assert load_latents(path)[1] == {"prompt": r"caf\udce9"}
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"prompt": r"caf\udce9"}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[]", "damaged safetensors header"),
        ('"x"', "damaged safetensors header"),
        ('{"seed": 7}', "damaged safetensors header.*more than strings"),
        ('{"seed": null}', "damaged safetensors header.*more than strings"),
        ("[" * 100_000 + "]" * 100_000, "damaged safetensors header.*recursion"),
    ],
)
def test_strange_metadata_is_one_sentence(tmp_path, metadata, message):
    path = tmp_path / "x.safetensors"
    header = f'{{"__metadata__": {metadata}, "latents": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(UserError, match=message) as error:
        load_latents(path)
    assert "\n" not in str(error.value)


def test_null_metadata_is_none_as_in_the_formats_library(tmp_path):
    path = tmp_path / "x.safetensors"
    entry = '{"dtype": "F32", "shape": [1, 1, 1, 1, 1], "data_offsets": [0, 4]}'
    header = f'{{"__metadata__": null, "latents": {entry}}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 4)
    assert load_file(path)["latents"].shape == (1, 1, 1, 1, 1)
    assert load_latents(path)[1] == {}


def test_truncated_and_absent(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        load_latents(path)
    save_latents(path, LATENTS, META)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        load_latents(path)


def test_an_existing_file_stays_unless_told(tmp_path):
    path = tmp_path / "x.safetensors"
    save_latents(path, LATENTS, {})
    with pytest.raises(UserError, match="exists already"):
        save_latents(path, LATENTS + 1, {})
    np.testing.assert_array_equal(load_latents(path)[0], LATENTS)
    save_latents(path, LATENTS + 1, {}, overwrite=True)
    np.testing.assert_array_equal(load_latents(path)[0], LATENTS + 1)


def test_a_write_that_fails_midway_leaves_nothing(tmp_path):
    """A process that may write no file beyond 1 KB stands for a full disk."""
    code = (
        "import resource, signal, sys, pathlib, numpy as np\n"
        "from maxdiffusion.errors import UserError\n"
        "from maxdiffusion.weights.latents_io import save_latents\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "try: save_latents(pathlib.Path(sys.argv[1]), np.zeros((1, 2, 8, 8, 16), np.float32), {})\n"
        "except UserError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.safetensors")], capture_output=True, text=True, check=True
    )
    assert "cannot write" in run.stdout and run.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == []
