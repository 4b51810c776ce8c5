"""`inspect=true`, as its own process where time and imports count."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from maxdiffusion import inspection, request
from maxdiffusion.cli import command
from maxdiffusion.errors import UserError
from maxdiffusion.weights.tables import original
from tests.support.safetensors_file import original_name, write

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "wan_tiny.yml"
MODEL = ROOT / "models" / "wan_tiny"


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(MODEL, tmp_path / "copy"))


def inspect(*words):
    job = request.load([str(TINY), "inspect=true", *words])
    inspection.run(job)


def test_a_whole_checkpoint(capsys):
    inspect("vae_dtype=bfloat16")
    text = capsys.readouterr().out
    assert text.startswith("wan-tiny-t2v (T2V): 6 layers of 8 heads x 16 with 8 input channels\n")
    sizes = {
        net: sum(a.size for a in load_file(next((MODEL / net).glob("*.safetensors"))).values())
        for net in ("transformer", "vae")
    }
    for net, size in sizes.items():
        assert re.search(rf"^{net} +diffusers +F16 .*{size / 1e6:,.1f} M +{net}$", text, re.M), text
    assert f"vae {2 * sizes['vae'] / 2**20:.2f} MiB" in text
    assert text.endswith("every parameter has its tensor and every tensor its parameter\n")


def test_a_single_file_in_fp8(tmp_path, capsys):
    """Named, counted and measured by what is stored."""
    arrays = {}
    for name, array in load_file(MODEL / "transformer" / "diffusion_pytorch_model.safetensors").items():
        name = original_name(name, original.DIT)[0]
        if name.startswith("blocks") and name.endswith("ffn.0.weight"):
            arrays[name.removesuffix("weight") + "weight_scale"] = np.ones((), np.float32)
            array = array.astype(ml_dtypes.float8_e4m3fn)
        arrays[name] = array
    write(tmp_path / "fp8.safetensors", arrays)
    inspect(f"transformer_file={tmp_path}/fp8.safetensors")
    text = capsys.readouterr().out
    assert re.search(rf"^transformer +original +F16 .*, F8_E4M3 scaled \d+.*{tmp_path}/fp8\.safetensors$", text, re.M)


def test_every_net_that_does_not_fit_is_named(copy, capsys):
    for net, gone in {"transformer": "blocks.3.attn1.to_q.bias", "vae": "quant_conv.bias"}.items():
        path = copy / net / "diffusion_pytorch_model.safetensors"
        arrays = load_file(path)
        arrays["stray.weight"] = arrays.pop(gone)
        write(path, arrays)
    assert command([str(TINY), "inspect=true", f"pretrained_model_name_or_path={copy}"]) == 2
    out, err = capsys.readouterr()
    assert "text_encoder" in out and "every parameter" not in out
    for net, gone in {"transformer": r"blocks\.3\.attn1\.to_q\.bias", "vae": r"quant_conv\.bias"}.items():
        assert re.search(rf"^error: .*{net} do not fit.*missing.*{gone}.*not a part.*stray\.weight", err, re.M), err


def test_a_hub_id_is_not_fetched():
    words = ["model_name=wan2.1-t2v-1.3b", "pretrained_model_name_or_path=nobody/has-this"]
    with pytest.raises(UserError, match=r"nothing is fetched to be inspected and it is not in the cache"):
        inspect(*words)


def test_the_headers_are_told_before_jax_is_imported():
    code = (
        "import builtins, sys\n"
        "from maxdiffusion import inspection, request\n"
        "class Stop(Exception): pass\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('jax', 'numpy', 'torch'): raise Stop(name)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "try: inspection.run(request.load(sys.argv[1:]))\n"
        "except Stop as stop: print('stopped at', stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(TINY), "inspect=true"], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("stopped at") and len(lines) == 7, done.stdout + done.stderr
