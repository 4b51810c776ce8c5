"""A run tells when it will be done, of two videos after the first of them."""

import re

from maxdiffusion import cli
from maxdiffusion.runtime import progress


def test_the_end_of_the_run_is_in_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "SOON", 0.0)
    size = ["--height", "32", "--width=32", "num_frames=5", "output_format=npy", "progress=auto"]
    prompts = ["--prompt", "[a red circle, a blue square]"]
    assert cli.command(["wan_tiny_4step", *prompts, *size, f"output_dir={tmp_path}", "jax_cache_dir="]) == 0
    lines = [re.sub(r"\d\d:\d\d(:\d\d)?|\d+\.\d", "T", line) for line in capsys.readouterr().err.splitlines()]
    lines = [line for line in lines if re.search(r"T (denoise|decode) ", line)]
    assert lines[0] == "T denoise (4 steps)"
    assert lines[1].endswith("; denoise done T")  # nothing is decoded yet
    first, second = (row for row, line in enumerate(lines) if line == "T denoise (4 steps)")
    assert lines[second + 1].endswith("; run done T")
    assert lines[-1] == "T decode done in T s"  # nothing is left
    assert second > first
