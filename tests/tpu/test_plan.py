"""A plan for TPUs that are not there, of the bundled miniature: what the compiler says, in the command's words."""

import json

import pytest

from maxdiffusion import cli
from tests.support.tpu_compiler import ROOT, needs_libtpu

pytestmark = needs_libtpu

WORDS = ["size=16*16", "num_frames=1", "attention=dot_product", "ici_data_parallelism=1", "jax_cache_dir="]


@pytest.mark.slow
def test_the_miniature_on_a_slice(tmp_path):
    files = f"plan_file=[{tmp_path / 'plan.json'}, {tmp_path / 'plan.svg'}]"
    assert cli.command([str(ROOT / "configs" / "wan_tiny.yml"), "plan=v6e-4", *WORDS, files]) == 0
    best = json.loads((tmp_path / "plan.json").read_text())["recommended"]
    assert best["split"] == "context 4, keys gathered" and best["fits"]
    assert best["sources"] == dict.fromkeys(["text", "denoise", "decode"], "compiled")
    assert all(0 < gib < 1 for gib in best["gib"].values())
    step = best["step_seconds"]
    assert 0 < step["low"] < step["total"] < step["high"] and step["exposed"] > 0
    assert "predicted seconds of a denoise step" in (tmp_path / "plan.svg").read_text()
