"""The completion scripts in real shells: keys, values, pages and files, without a process of Python's."""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from maxdiffusion.config import completion, pages, schema
from maxdiffusion.errors import UserError

SHELLS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SHELLS:
        (folder / shell).write_text(completion.script(shell))
    return folder


def complete(script: Path, folder: Path, line: str) -> list[str]:
    """What bash offers at the end of a line that begins with generate_wan."""
    words = [word for word in re.split(r"\s+|(=)", line) if word]  # = is a word of its own, as in COMP_WORDS
    words += [""] if line.endswith(" ") else []
    program = (
        f'source {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); compopt() {{ :; }}; _generate_wan\n'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    run = ["bash", "-c", program, "bash", *words]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("generate_wan wan_tiny sol", {"solver="}),
        ("generate_wan wan_tiny solver=", {"unipc", "euler", "dpmpp_2m", "renoise", "dpm++"}),
        ("generate_wan wan_tiny solver=e", {"euler"}),
        ("generate_wan wan_tiny sample_solver=dpm+", {"dpm++"}),
        ("generate_wan wan_tiny --solver e", {"euler"}),
        ("generate_wan wan_tiny --solver=e", {"euler"}),
        ("generate_wan wan_tiny --num-", set()),
        ("generate_wan --offload", {"--offload_model"}),
        ("generate_wan wan_tiny overwrite=", {"true", "false"}),
        ("generate_wan --task t2v-A", {"t2v-A14B"}),
        ("generate_wan wan_tiny model_name=wan-tiny-i", {"wan-tiny-i2v"}),
        ("generate_wan wan_tiny size=12", {"1280*704", "1280*720"}),
        ("generate_wan wan_tiny image=ca", {"cat.png"}),
        ("generate_wan wan_tiny --image ca", {"cat.png"}),
        ("generate_wan wan_tiny prompt=", set()),
        ("generate_wan wan_tiny_4", {"wan_tiny_4step"}),
        ("generate_wan v6e-8/wan2.1_fl", {"v6e-8/wan2.1_flf2v_14b"}),
        ("generate_wan min", {"mine.yml"}),
        ("generate_wan li", {"list"}),
        ("generate_wan wan_tiny li", set()),
        ("generate_wan --help hos", {"hosts"}),
    ],
)
def test_bash_completes(scripts: Path, tmp_path: Path, line: str, expected: set[str]) -> None:
    for name in ("cat.png", "mine.yml", "1280*7000"):
        (tmp_path / name).touch()
    assert set(complete(scripts / "bash", tmp_path, line)) == expected


def test_every_key_and_page_is_offered(scripts: Path, tmp_path: Path) -> None:
    first = set(complete(scripts / "bash", tmp_path, "generate_wan "))
    assert {f"{key}=" for key in (*schema.KEYS, *schema.ALIASES, *schema.COMPOUND_ALIASES)} < first
    assert set(pages.names()) < first
    assert {f"--{key}" for key in schema.KEYS} < set(complete(scripts / "bash", tmp_path, "generate_wan --"))


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("typed", "shown"),
    [("wan_tiny solver=eul", "solver=euler"), ("wan_tiny_4", "wan_tiny_4step"), ("--sample_st", "--sample_steps")],
)
def test_a_tab_in_a_terminal(shell: str, typed: str, shown: str, scripts: Path, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PS1": "READY ", "TERM": "dumb", "ZDOTDIR": str(tmp_path)}
    program = subprocess.Popen(
        SHELLS[shell], stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment, start_new_session=True
    )
    os.close(theirs)
    setup = "autoload -U compinit; compinit -u -D; " if shell == "zsh" else ""
    try:
        os.write(ours, f"{setup}source {scripts / shell}; echo SOUR''CED\n".encode())
        assert "SOURCED" in read_until(ours, "SOURCED")
        os.write(ours, f"generate_wan {typed}\t".encode())
        assert shown in read_until(ours, shown)
    finally:
        program.kill()
        program.wait()
        os.close(ours)


def read_until(terminal: int, text: str) -> str:
    """What the terminal shows up to `text`, for half a minute."""
    shown, end = b"", time.monotonic() + 30
    while text.encode() not in shown and time.monotonic() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            shown += os.read(terminal, 4096).replace(b"\a", b"")  # the bell
    return shown.decode(errors="replace")


def test_the_scripts_start_no_process(scripts: Path) -> None:
    for shell in SHELLS:
        assert "python" not in (scripts / shell).read_text()


def test_another_shell_is_refused() -> None:
    with pytest.raises(UserError, match="completion bash or zsh"):
        completion.script("fish")
