"""A run compiles each of its programs once, however many videos it makes."""

from __future__ import annotations

import collections
import re
from pathlib import Path

import jax

from maxdiffusion import cli
from maxdiffusion.runtime import distributed

ROOT = Path(__file__).parents[2]


def test_no_program_is_compiled_twice(tmp_path, monkeypatch, caplog):
    """Of two batches; what the run executes op by op is compiled, too, and there is little of it."""
    monkeypatch.setattr(distributed, "devices", lambda: jax.devices()[:1])
    words = [
        str(ROOT / "configs" / "wan_tiny.yml"),
        f"pretrained_model_name_or_path={ROOT / 'models' / 'wan_tiny'}",
        *("prompt=[a red circle, a blue square]", "base_seed=1", "size=48*32", "num_frames=9", "num_inference_steps=2"),
        *("attention=dot_product", f"output_dir={tmp_path}", f"jax_cache_dir={tmp_path}/xla"),
    ]
    jax.clear_caches()
    with jax.log_compiles():
        assert cli.command(words) == 0
    lines = (re.match(r"Compiling jit\((.+?)\) with global shapes and types (.*?)\. Arg", at) for at in caplog.messages)
    programs = collections.Counter(line.groups() for line in lines if line)
    assert set(programs.values()) == {1}, programs.most_common(3)
    assert {name for name, _ in programs} == {
        "_run",
        "_prepare",
        "init",
        "step",
        "_folded",
        "_noise",
        "_count",
        "_quantise",
    }
