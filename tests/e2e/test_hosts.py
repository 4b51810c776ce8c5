"""Two real processes of four virtual devices each, as two hosts would run the command."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from maxdiffusion import generate_wan, request
from maxdiffusion.weights.latents_io import load_latents
from tests.support.hosts import free_port
from tests.support.videos import psnr

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "wan_tiny.yml")
COMMAND = (str(ROOT / "generate_wan.py"), CONFIG, "output_format=npy", "jax_cache_dir=", "num_inference_steps=4")
MESH = ("attention=ulysses_ring", "ulysses_shards=2", "ici_context_parallelism=8")
SMALL = ("height=32", "width=32", "num_frames=1", "guidance_scale=1", "logical_axis_rules=[[width, null]]")


@contextlib.contextmanager
def processes(*commands: Sequence[str], limit_first: int | None = None, **env: str) -> Iterator[list[subprocess.Popen]]:
    """One process for each command; `limit_first` is the largest file, in bytes, that the first may write."""
    address, started = f"localhost:{free_port()}", []

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_first, limit_first))

    try:
        for index, command in enumerate(commands):
            launcher = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
            started.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", **launcher, **env},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    preexec_fn=limit if limit_first and index == 0 else None,
                )
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def finish(started: list[subprocess.Popen], timeout: float = 500) -> tuple[list[int], list[str]]:
    """Exit codes, and what each said on stderr."""
    said = [process.communicate(timeout=timeout)[1] for process in started]
    return [process.returncode for process in started], said


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def check_the_same_video(tmp_path: Path, *words: str, mesh: Sequence[str] = MESH, **env: str) -> None:
    mine, others = tmp_path / "first", tmp_path / "second"
    with processes(*([*COMMAND, *mesh, *words, f"output_dir={folder}"] for folder in (mine, others)), **env) as started:
        codes, said = finish(started)
    assert codes == [0, 0], said
    assert "process 0 of 2, 8 devices" in said[0] and "denoise done" in said[0]
    assert "denoise" not in said[1] and "wrote" not in said[1]
    one = ("attention=dot_product", "ici_data_parallelism=-1", "ici_context_parallelism=1", "log_level=error")
    alone = generate_wan.run(request.load([*COMMAND[1:], *one, *words, f"output_dir={tmp_path / 'one'}"]))
    assert alone and files_in(mine) == files_in(tmp_path / "one") and not others.exists()
    for path in alone:
        video = np.load(path)
        assert video.std() > 5, "a flat video would compare equal to anything flat"
        figure = psnr(np.load(mine / path.relative_to(tmp_path / "one")), video)
        print(f"two processes: {figure:.1f} dB")
        assert figure > 60


def test_the_same_video_small(tmp_path):
    check_the_same_video(tmp_path, *SMALL, XLA_FLAGS="--xla_backend_optimization_level=0")


@pytest.mark.slow
def test_the_same_video(tmp_path):
    check_the_same_video(tmp_path)


@pytest.mark.slow
def test_the_same_two_videos(tmp_path):
    mesh = ("attention=ulysses_ring", "ulysses_shards=2", "ici_context_parallelism=4", "ici_data_parallelism=2")
    prompts = "prompt=[a red circle moving right on a navy background, a white square moving down on a gray background]"
    check_the_same_video(tmp_path, prompts, "height=64", "width=64", "num_frames=5", mesh=mesh)


def test_another_config_is_refused_by_both(tmp_path):
    words = [*COMMAND, *MESH, f"output_dir={tmp_path / 'out'}"]
    with processes([*words, "seed=7"], [*words, "seed=8", "log_level=debug"]) as started:
        codes, said = finish(started)
    assert codes == [2, 2], said
    for text in said:
        assert "do not agree on seed (process 0: [7], process 1: [8])" in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_broken_checkpoint_on_one_host_ends_both(tmp_path, bundled):
    words = [*COMMAND, *MESH, f"output_dir={tmp_path / 'out'}"]
    broken = tmp_path / "broken"
    broken.mkdir()
    for entry in bundled.iterdir():
        (broken / entry.name).symlink_to(entry)
    (broken / "vae").unlink()
    with processes(words, [*words, f"pretrained_model_name_or_path={broken}"]) as started:
        codes, said = finish(started)
    assert codes == [2, 2], said
    assert "process 1 of this run failed:" in said[0] and "no folder 'vae'" in said[0]
    assert "no folder 'vae'" in said[1].splitlines()[-1]


@pytest.mark.slow
def test_a_full_disk_on_process_0_ends_both(tmp_path):
    words = [*COMMAND, *MESH, *SMALL, f"output_dir={tmp_path / 'out'}", "checkpoint_steps=0"]
    with processes(words, words, limit_first=100) as started:
        codes, said = finish(started)
    assert codes == [2, 2], said
    assert all("larger than the file system" in text for text in said)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def other_weights(folder: Path) -> None:
    """The same headers with every number's last bits changed."""
    (file,) = (folder / "transformer").glob("*.safetensors")
    content = np.frombuffer(file.read_bytes(), np.uint8).copy()
    content[8 + int.from_bytes(content[:8].tobytes(), "little") :: 4] ^= 1
    file.write_bytes(content.tobytes())


def other_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace("red", "der"))


@pytest.mark.parametrize(
    ("change", "what"),
    [(other_weights, "transformer"), pytest.param(other_tokenizer, "tokenizer", marks=pytest.mark.slow)],
)
def test_other_files_on_one_host_are_refused_by_both(tmp_path, bundled, change, what):
    changed = shutil.copytree(bundled, tmp_path / "changed")
    change(changed)
    words = [*COMMAND, *MESH, f"output_dir={tmp_path / 'out'}"]
    with processes(words, [*words, f"pretrained_model_name_or_path={changed}"]) as started:
        codes, said = finish(started)
    assert codes == [2, 2], said
    for text in said:
        assert f"error: the processes of this run do not agree on content of {what} (process 0: " in text
        assert "denoise" not in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def wait_for(process: subprocess.Popen, words: str) -> None:
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"it ended before it said {words!r}")


@pytest.mark.parametrize(
    ("victim", "number", "when", "code"),
    [
        (1, signal.SIGTERM, "denoise (", 75),
        pytest.param(0, signal.SIGKILL, "denoise (", 75, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGTERM, "denoise (", 75, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGKILL, "denoise (", 75, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGINT, "denoise (", 130, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, "denoise (", 130, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGTERM, "process 0 of 2", 75, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGKILL, "process 0 of 2", 75, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGTERM, "compile", 75, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_ends_both_within_seconds(tmp_path, victim, number, when, code):
    words = [*COMMAND, *MESH, *SMALL, f"output_dir={tmp_path / 'out'}", "num_inference_steps=1000"]
    words.remove("num_inference_steps=4")
    with processes(words, words) as started:
        wait_for(started[0], when)
        time.sleep(1)
        started[victim].send_signal(number)
        begun = time.monotonic()
        codes, said = finish(started, timeout=100)
        seconds = time.monotonic() - begun
    print(f"{number.name} to process {victim} after {when!r}: {codes}, {seconds:.1f} s")
    assert codes == [-9 if number == signal.SIGKILL and index == victim else code for index in (0, 1)], said
    if number == signal.SIGKILL:
        assert f"error: process {victim} of this run ended without a word" in said[1 - victim]
    elif when == "denoise (":
        sentences = [[line for line in text.splitlines() if "whose state is saved" in line] for text in said]
        assert sentences[0][-1:] == sentences[1][-1:] and f"{number.name}: stopped after step" in sentences[0][-1]
    saved = number != signal.SIGKILL and when == "denoise ("  # a step and the state are written, whatever they take
    assert seconds < (60 if saved else 10)


@pytest.mark.slow
def test_both_go_on_with_the_state_of_a_cache(tmp_path):
    """Process 0 has it; its tokens are in bfloat16, and padded over the eight devices."""
    words = [*COMMAND, *MESH, *SMALL, "num_inference_steps=300", "cache=sea", "activations_dtype=bfloat16"]
    words = [word for word in words if word not in ("num_inference_steps=4", "num_frames=1")] + ["num_frames=5"]
    for folder, stopped in (("whole", False), ("out", True), ("out", False)):
        each = [*words, f"output_dir={tmp_path / folder}"]
        with processes(each, each) as started:
            if stopped:
                wait_for(started[0], "denoise (")
                time.sleep(2)
                started[1].send_signal(signal.SIGTERM)
            codes, said = finish(started)
        assert codes == ([75, 75] if stopped else [0, 0]), said
    assert "resuming at step" in said[0] and "starts anew" not in said[0]
    whole, found = (next((tmp_path / folder).rglob("*.latents.safetensors")) for folder in ("whole", "out"))
    records = [
        json.loads(path.with_name(path.name.replace(".latents.safetensors", ".json")).read_text())["cache"]
        for path in (whole, found)
    ]
    assert records[0] == records[1] and len(records[0]["computed"][0]["prompt"]) < 300
    np.testing.assert_allclose(load_latents(found)[0], load_latents(whole)[0], atol=1e-5)


@pytest.mark.slow
def test_a_host_that_is_late_is_waited_for(tmp_path):
    words = [*COMMAND, *MESH, *SMALL, f"output_dir={tmp_path / 'out'}"]
    with processes(words, words) as started:
        wait_for(started[0], "process 0 of 2")
        started[1].send_signal(signal.SIGSTOP)
        time.sleep(45)
        started[1].send_signal(signal.SIGCONT)
        codes, said = finish(started)
    assert codes == [0, 0], said


@pytest.mark.slow
def test_weights_that_vanish_on_one_host_end_both(tmp_path, bundled):
    """A failure that no other process takes part in: the VAE is read by each alone, after the denoise."""
    own = shutil.copytree(bundled, tmp_path / "own")
    words = [*COMMAND, *MESH, *SMALL, f"output_dir={tmp_path / 'out'}"]
    with processes(words, [*words, f"pretrained_model_name_or_path={own}"]) as started:
        wait_for(started[0], "denoise (")
        for file in (own / "vae").glob("*.safetensors"):
            file.unlink()
        codes, said = finish(started)
    assert codes == [2, 2], said
    assert "error: process 1 of this run failed: " in said[0] and "Traceback" not in said[1]


@pytest.mark.slow
def test_a_platform_that_one_host_lacks_ends_both(tmp_path):
    words = [*COMMAND, *MESH, *SMALL, f"output_dir={tmp_path / 'out'}"]
    with processes(words, ["-c", WITH_CUDA, *words]) as started:
        codes, said = finish(started)
    assert codes == [2, 2], said
    assert all("jax cannot start its devices with JAX_PLATFORMS=cuda" in text for text in said)


WITH_CUDA = """
import os, runpy, sys
os.environ["JAX_PLATFORMS"] = "cuda"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

BYTES_READ = """
import sys
from pathlib import Path
from maxdiffusion import request
from maxdiffusion.request import session

def read():
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar: bytes of all reads

job = request.load(sys.argv[1:])
session.start(job)
with session.opened(job) as s:
    s.load("transformer")  # imports modules, whose files are reads as well
    before = read()
    s.load("transformer")
    print(read() - before, s.nets.nbytes_on_disk("transformer"))
"""


SEEDS = """
import sys
from maxdiffusion import request
from maxdiffusion.request import seeds, session

job = request.load(sys.argv[1:])
session.start(job)
print(*(video.seed for video in seeds.drawn(job).videos))
"""


def test_both_processes_draw_the_same_seeds(tmp_path):
    command = ["-c", SEEDS, CONFIG, "jax_cache_dir=", "seed=[-1, 7, -1]", f"output_dir={tmp_path}"]
    with processes(command, command, PYTHONPATH=str(ROOT)) as started:
        one, other = (process.communicate(timeout=200)[0].split()[-3:] for process in started)
    assert one == other and one[1] == "7" and len(set(one)) == 3 and "-1" not in one


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts the bytes that a process reads")
def test_a_host_reads_only_what_its_devices_hold(tmp_path):
    """Split by rows over eight devices, all weights but the small whole ones are read half by each process."""
    rows = "logical_axis_rules=[[mlp, [fsdp, tensor]], [heads, [fsdp, tensor]], [embed, null]]"
    command = ["-c", BYTES_READ, CONFIG, "ici_fsdp_parallelism=2", "ici_tensor_parallelism=4", rows]
    with processes(command, command, PYTHONPATH=str(ROOT)) as started:
        out = [process.communicate(timeout=100) for process in started]
    for read, whole in (map(int, text.split()[-2:]) for text, _ in out):
        print(f"read {read} of {whole} bytes: {read / whole:.0%}")
        assert whole / 2 < read < 0.8 * whole
