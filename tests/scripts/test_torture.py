"""The tools that torture runs, with few kills and videos."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script, *words):
    done = subprocess.run([sys.executable, str(SCRIPTS / script), *map(str, words)], capture_output=True, text=True)
    print(done.stdout)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one", "experts", "segments", "prompts"])
def test_killed_runs_go_on_on_other_meshes(tmp_path, case):
    code, said = run("kill_and_resume.py", tmp_path, "--case", case, "--kills", 2)
    assert code == 0 and f"{case}: 2 kills" in said and ", 0 faults" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGTERM", "disk full", "folder vanishes", "503", "a host dies", "two of one name"])
def test_a_fault_loses_no_more_than_steps(tmp_path, fault):
    code, said = run("faults.py", tmp_path, "--only", fault)
    assert code == 0, said


@pytest.mark.slow
def test_a_long_run_does_not_grow(tmp_path):
    code, said = run("soak.py", tmp_path, "--videos", 30)
    assert code == 0 and "from the tenth to the last of 30" in said, said
