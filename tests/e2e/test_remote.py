"""Config, weights, latents and results in a bucket, by the same command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maxdiffusion import cli
from maxdiffusion.runtime import paths
from tests.support.bucket import bucket

__all__ = ["bucket"]  # a fixture
ROOT = Path(__file__).parents[2]
SMALL = ("num_inference_steps=2", "height=32", "width=32", "num_frames=1", "output_format=npy", "guidance_scale=1")
QUIET = ("log_level=error", "progress=off")


def put(folder: Path, there: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            paths.upload(file, paths.parse(there) / str(file.relative_to(folder)), overwrite=False)


def test_a_run_from_and_to_a_bucket(bucket, bundled, tmp_path):
    put(ROOT / "configs", "gs://models/configs")
    put(bundled, "gs://models/models/wan_tiny")
    words = [*SMALL, *QUIET, f"jax_cache_dir={tmp_path / 'xla'}"]  # what is compared is where things lie
    # ../models/wan_tiny in the YAML file is beside it in the bucket
    assert cli.command(["gs://models/configs/wan_tiny.yml", *words, "output_dir=gs://results/today"]) == 0
    assert bucket.reads > 100 and bucket.most_at_once >= 2
    local = tmp_path / "local"
    assert cli.command([str(ROOT / "configs" / "wan_tiny.yml"), *words, f"output_dir={local}"]) == 0
    there = paths.parse("gs://results/today/wan-tiny-t2v")
    names = sorted(entry.name for entry in (local / "wan-tiny-t2v").iterdir())
    assert sorted(paths.names(there)) == names and len(names) == 3
    video = next(name for name in names if name.endswith(".npy"))
    np.testing.assert_array_equal(
        np.load((there / video).open("rb")), np.load(local / "wan-tiny-t2v" / video), strict=True
    )
    record = json.loads((there / names[0]).read_text())
    assert record["config"]["pretrained_model_name_or_path"] == "gs://models/models/wan_tiny"

    latents = str(there / next(name for name in names if name.endswith(".safetensors")))
    again = [
        "gs://models/configs/wan_tiny.yml",
        *words,
        f"decode_latents={latents}",
        "save_file=gs://results/again.npy",
    ]
    assert cli.command(again) == 0
    np.testing.assert_array_equal(
        np.load(paths.parse("gs://results/again.npy").open("rb")), np.load((there / video).open("rb"))
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["gs://models/configs/wan_tinny.yml"], "did you mean gs://models/configs/wan_tiny.yml?"),
        (["gs://models/configs/wan_tiny.yml", "pretrained_model_name_or_path=gs://models/nowhere"], "nowhere"),
        (["gs://models/configs/wan_tiny.yml", "initial_latents=gs://models/no.safetensors"], "is not an existing file"),
        (["gs://models/configs/wan_tiny.yml", "output_dir=gs://results", "output_format=png"], "choose webp"),
        (["gs://models/configs/wan_tiny.yml", "output_dir=nose://results"], "has an unknown scheme"),
    ],
)
def test_a_mistake_is_one_sentence(bucket, bundled, capsys, words, named):
    put(ROOT / "configs", "gs://models/configs")
    put(bundled, "gs://models/models/wan_tiny")
    assert cli.command([*words, *QUIET, "jax_cache_dir="]) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1


CACHE = """
import sys
from pathlib import Path
from tests.support.bucket import register
register(Path(sys.argv[1]))
import jax, jax.numpy as jnp
from maxdiffusion.runtime import compile_cache
compile_cache.enable("gs://programs/xla")
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).block_until_ready()
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def test_programs_are_kept_in_a_bucket(tmp_path):
    def run() -> int:
        done = subprocess.run(
            [sys.executable, "-c", CACHE, str(tmp_path)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    (tmp_path / "programs").mkdir()
    assert run() == 0
    assert list((tmp_path / "programs" / "xla").glob("*-cache"))
    assert run() >= 1
