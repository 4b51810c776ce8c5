"""The real command in a process of its own: exit codes, one line on stderr, nothing left behind, quick answers."""

import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest

import maxdiffusion
from maxdiffusion import cli
from maxdiffusion.errors import UserError

ROOT = Path(maxdiffusion.__file__).parents[1]
CONFIG = str(ROOT / "configs" / "wan2.1_t2v_1.3b.yml")


def generate_wan(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "generate_wan.py"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([CONFIG, "prompt=a", "heigth=480"], "did you mean height?"),
        ([CONFIG, "prompt=a", "height=100"], "the nearest are 96 or 112"),
        ([CONFIG], "prompt is missing"),
        ([CONFIG, "prompt=a", "save_file=there.mp4"], "there.mp4 exists already"),
        ([CONFIG, "prompt=a", "save_file=new/clip.avi"], "output_format=avi"),
        ([CONFIG, "prompt=a", "output_dir=there.mp4"], "cannot be written"),
        ([CONFIG, "prompt=a", "-h=480"], "unknown option"),
        ([CONFIG, "--prompt", "a", "--height", "100"], "the nearest are 96 or 112"),
        (["wan2.1_t2v_1.3", "--prompt", "a"], "did you mean wan2.1_t2v_1.3b?"),
        (["--help", "num_frame"], "did you mean num_frames?"),
        (["completion", "fish"], "completion bash or zsh"),
        (["broken.yml", "prompt=a"], "is not valid YAML"),
        (["missing.yml", "prompt=a"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], expected: str) -> None:
    (tmp_path / "there.mp4").touch()
    (tmp_path / "broken.yml").write_text("prompt: [a\n")
    before = sorted(tmp_path.rglob("*"))
    done = generate_wan(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and expected in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["-h"],
        [CONFIG, "--help"],
        ["--help", "video"],
        ["completion", "bash"],
        [CONFIG, "prompt=a", "heigth=480"],
        ["wan_tiny", "--heigth", "480"],
    ],
)
def test_help_and_a_misspelt_key_answer_at_once_without_jax(tmp_path: Path, words: list[str]) -> None:
    program = (
        "import atexit, sys\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'numpy', 'torch', 'transformers'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
        "from maxdiffusion.cli import main\n"
        "main()\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "height" in done.stdout + done.stderr
    # Processor time, so that a busy machine does not fail the test: 0.25 s measured, the same by an idle clock.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_version_and_usage(tmp_path: Path) -> None:
    assert generate_wan(tmp_path, "--version").stdout == f"maxdiffusion {maxdiffusion.__version__}\n"
    nothing = generate_wan(tmp_path)
    assert nothing.returncode == 2 and nothing.stderr.startswith("usage: generate_wan PAGE")


@pytest.mark.parametrize(("raised", "code"), [(None, 0), (UserError("no."), 2), (KeyboardInterrupt(), 130)])
def test_exit_codes(raised: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def run(cfg: object) -> None:
        seen.append(cfg)
        if raised:
            raise raised

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(maxdiffusion, "generate_wan", types.SimpleNamespace(run=run), raising=False)
    assert cli.command([CONFIG, "prompt=a"]) == code
    assert len(seen) == 1


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(cfg: object) -> None:
        raise ZeroDivisionError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(maxdiffusion, "generate_wan", types.SimpleNamespace(run=run), raising=False)
    with pytest.raises(ZeroDivisionError):
        cli.command([CONFIG, "prompt=a"])
