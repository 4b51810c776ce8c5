"""The whole command with the bundled miniature's nets as GGUF files."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from maxdiffusion import cli
from maxdiffusion.weights.tables import original
from tests.support import gguf_file
from tests.support.gguf_file import Kind
from tests.support.safetensors_file import original_name
from tests.support.videos import psnr

ROOT = Path(__file__).parents[2]
SMALL = ("num_inference_steps=4", "height=48", "width=48", "num_frames=5", "output_format=npy", "progress=off")
TABLES = {"transformer": (original.DIT, "wan"), "text_encoder": (original.GGUF_UMT5, "t5encoder")}


@pytest.fixture(scope="module")
def files(bundled, tmp_path_factory):
    """Both nets with linear layers in Q8_0, and the numbers of those files as safetensors: the arguments of each."""
    folder, words = tmp_path_factory.mktemp("gguf"), {"gguf": [], "safetensors": []}
    for net, (table, architecture) in TABLES.items():
        (path,) = (bundled / net).glob("*.safetensors")
        stored, plain = {}, {}
        for name, array in load_file(path).items():
            array, theirs = np.float32(array), original_name(name, table)[0]
            if array.ndim == 2 and not array.shape[1] % 32 and "relative" not in name:
                data = gguf.quants.quantize(array, Kind.Q8_0)
                stored[theirs], plain[name] = (data, Kind.Q8_0), gguf.quants.dequantize(data, Kind.Q8_0)
            else:
                stored[theirs], plain[name] = (array, Kind.F32), array
        assert sum(kind is Kind.Q8_0 for _, kind in stored.values()) > 10
        gguf_file.write(folder / f"{net}.gguf", stored, architecture)
        save_file(plain, folder / f"{net}.safetensors")
        for suffix, arguments in words.items():
            arguments.append(f"{net}_file={folder / net}.{suffix}")
    return words


@pytest.mark.slow
def test_a_run_from_gguf_files(files, tmp_path):
    videos = {}
    for name, words in {**files, "bundled": []}.items():
        out = tmp_path / f"{name}.npy"
        page = str(ROOT / "configs" / "wan_tiny.yml")
        assert cli.command([page, *SMALL, *words, f"save_file={out}", f"jax_cache_dir={tmp_path / 'xla'}"]) == 0
        videos[name] = np.load(out)
    np.testing.assert_array_equal(videos["gguf"], videos["safetensors"])
    assert psnr(videos["gguf"], videos["bundled"]) > 40  # 47.9 measured


def test_inspection_tells_the_quantisation(files, capsys):
    assert cli.command([str(ROOT / "configs" / "wan_tiny.yml"), "inspect=true", *files["gguf"]]) == 0
    out = capsys.readouterr().out
    assert "every parameter has its tensor" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "Q8_0 9" in rows["transformer"] and ", F32 " in rows["transformer"], rows["transformer"]
