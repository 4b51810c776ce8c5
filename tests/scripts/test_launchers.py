"""The launchers run as they are, with a `python` and a `gcloud` in their place that only tell what they were given."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from maxdiffusion import request
from maxdiffusion.parallel.mesh import Degrees

ROOT = Path(__file__).parents[2]
LAUNCHERS = {  # devices of one slice
    "gpu.sh": 8,
    "tpu_slice.sh": 16,
    "tpu_v5e-8.sh": 8,
    "tpu_v5p-8.sh": 4,
    "tpu_v6e-8.sh": 8,
    "tpu_v7x-8.sh": 8,
}
STUBS = {
    "python": 'printf "%s\\0" "$@"',
    # as ssh does: the command goes to a shell on the other side
    "gcloud": 'for word in "$@"; do case "$word" in --command=*) exec bash -c "${word#--command=}";; esac; done',
}


def test_all_are_listed() -> None:
    assert {path.name for path in (ROOT / "scripts").glob("*.sh")} == {*LAUNCHERS, "gpu_check.sh"}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_gives_a_legal_config(tmp_path: Path, name: str) -> None:
    for stub, body in STUBS.items():
        (tmp_path / stub).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / stub).chmod(0o755)
    (tmp_path / "maxdiffusion").symlink_to(ROOT)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    env |= {"TPU_NAME": "slice", "ZONE": "z", "BUCKET": str(tmp_path / "bucket")}
    prompt = 'prompt=a cat\'s "walk" for $5 * 2'
    done = subprocess.run([ROOT / "scripts" / name, prompt], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script, yml, *words = done.stdout.split("\0")[:-1]
    assert script == "generate_wan.py"
    cfg = request.load([str(ROOT / yml), *words]).cfg
    assert cfg.prompt == (prompt.removeprefix("prompt="),)
    data = 1 if cfg.ici_data_parallelism == "auto" else cfg.ici_data_parallelism
    filled = Degrees(data, 1, cfg.ici_context_parallelism, 1).filled(LAUNCHERS[name])
    assert cfg.ulysses_shards == -1 or filled.context % cfg.ulysses_shards == 0


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_word_is_explained(name: str) -> None:
    text = (ROOT / "scripts" / name).read_text()
    words = re.search(r"^words=\(\n(.*?)^\)", text, re.MULTILINE | re.DOTALL)
    assert words and all(re.match(r"  [a-z_]+=.* # \w", line) for line in words[1].splitlines())
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_shell_finds_no_fault(name: str) -> None:
    path = str(ROOT / "scripts" / name)
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    checker = shutil.which("shellcheck")
    if checker:
        done = subprocess.run([checker, path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
