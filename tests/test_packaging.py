"""The ranges of setup.py hold the pins that CI installs; the wheel holds pages and miniatures; the version is one."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import maxdiffusion

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def ranges() -> dict[str, Requirement]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    jax = ast.literal_eval(values["JAX"])
    entries = [entry.value if isinstance(entry, ast.Constant) else jax.format("") for entry in values["RUNTIME"].elts]
    return {requirement.name: requirement for requirement in map(Requirement, entries)}


def test_every_pin_lies_in_its_range() -> None:
    found = ranges()
    for name, version in pins().items():
        if name != "jaxlib":  # jax asks for its own
            assert found[name].specifier.contains(version), name
    assert set(found) | {"jaxlib"} == set(pins())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a wheel that is installed beside this environment's packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools builds in the tree
    for name in ("maxdiffusion", "configs", "models"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    (wheel,) = folder.glob("maxdiffusion-*.whl")
    assert wheel.stat().st_size < 16e6
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after the wheel's own
    return folder / "venv" / "bin" / "generate_wan"


def run(command: Path, folder: Path, *words: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([command, *words], cwd=folder, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_works_from_any_folder(installed: Path, tmp_path: Path) -> None:
    assert run(installed, tmp_path, "--version") == f"maxdiffusion {maxdiffusion.__version__}\n"
    assert "num_inference_steps" in run(installed, tmp_path, "--help")
    assert [line.split()[0] for line in run(installed, tmp_path, "list", "tiny").splitlines()[1:4]] == [
        "wan_tiny",
        "wan_tiny_4step",
        "wan_tiny_i2v",
    ]
    run(installed, tmp_path, "wan_tiny_4step", "--prompt", "a red circle moving left on a navy background")
    (video,) = (tmp_path / "outputs" / "wan-tiny-t2v").glob("*.mp4")
    record = json.loads(video.with_suffix(".json").read_text())
    assert record["versions"]["maxdiffusion"] == maxdiffusion.__version__
    assert str(installed.parents[1]) in record["config"]["pretrained_model_name_or_path"]


def test_the_changelog_begins_with_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == maxdiffusion.__version__ and headings == sorted(headings, key=Version, reverse=True)
