"""Kills runs at random moments and goes on with the same command on other meshes, until nothing tells that they died.

    python scripts/kill_and_resume.py FOLDER                      # thirty kills of the miniature
    python scripts/kill_and_resume.py FOLDER --case experts segments prompts --kills 5
    python scripts/kill_and_resume.py FOLDER --kills 3 --seed 1

A run gets SIGKILL at a random event (a line that it writes, a state that it saves) and a random moment later, and the
same command goes on with another number of devices (1, 2, 4, 8 virtual ones), processes (1, 2) and split of attention,
where it may be killed again. Checked: no visible file is half, a run resumes at the newest state, the latents equal
those of one device that nobody disturbed, and nothing is left that it does not leave. Prints a line for each kill and
each end; exit code 1 if a check fails. `experts` and `segments` need the development requirements. Runs are forks of
one server in which everything is imported, which spares half of their time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
TOLERANCE = 1e-5  # of the largest latent
PRELOAD = ["maxdiffusion.generate_wan", "maxdiffusion.cli", "orbax.checkpoint", "optax"]
TINY = ("size=48*32", "num_frames=5", f"num_inference_steps={STEPS}")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command to torture.

    Attributes:
      prepare: (an empty folder) -> words of the command, after it has written there what they name.
      heads: of the network, which Ulysses divides.
    """

    prepare: Callable[[Path], Sequence[str]]
    heads: int


def one(folder: Path) -> list[str]:
    return [str(ROOT / "configs" / "wan_tiny.yml"), *TINY, "checkpoint_steps=1"]


def prompts(folder: Path) -> list[str]:
    """Six lines, two of them of another size."""
    lines = [{"seed": seed, "output": f"v{seed}"} | ({"size": "32*32"} if seed % 3 == 1 else {}) for seed in range(6)]
    (folder / "six.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [str(ROOT / "configs" / "wan_tiny.yml"), *TINY, "checkpoint_steps=3"]
    return [*words, f"prompts={folder / 'six.jsonl'}"]


def checkpoint(folder: Path, *more: str) -> Path:
    script = runpy.run_path(str(ROOT / "scripts" / "make_random_checkpoint.py"))
    script["main"]([str(folder / "checkpoint"), *more])
    return folder / "checkpoint"


def experts(folder: Path) -> list[str]:
    """Two experts in turn, two videos in two batches."""
    made = checkpoint(folder, "--nets", "text_encoder", "transformer", "transformer_2", "vae")
    index = json.loads((made / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.8}
    (made / "model_index.json").write_text(json.dumps(index))
    (folder / "run.yml").write_text("model_name: wan2.2-t2v\n")
    words = [str(folder / "run.yml"), f"pretrained_model_name_or_path={made}", *TINY, "seed=[1, 2]", "prompt=a cat"]
    words += ["checkpoint_steps=1", "flow_shift=3"]
    return [*words, "expert_residency=in_turn", "weights_dtype=float32", "activations_dtype=float32"]


ANIMATE = ("--nets", "text_encoder", "transformer", "image_encoder", "vae")


def segments(folder: Path) -> list[str]:
    """Animate's three segments."""
    from PIL import Image

    from maxdiffusion.media.write import write

    made = checkpoint(folder, "--preset", "tiny-animate", "--pipeline", "WanAnimatePipeline", *ANIMATE)
    rng = np.random.default_rng(0)
    for name, side in (("pose", (32, 48)), ("face", (32, 32))):
        write(rng.integers(0, 256, (13, *side, 3), np.uint8), folder / f"{name}.npy", 16, "npy", {})
    Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)).save(folder / "character.png")
    (folder / "run.yml").write_text("model_name: wan2.2-animate\n")
    words = [str(folder / "run.yml"), f"pretrained_model_name_or_path={made}", *TINY[2:], "width=48", "height=32"]
    words += ["checkpoint_steps=1"]
    words += [f"image={folder}/character.png", f"pose_video={folder}/pose.npy", f"face_video={folder}/face.npy"]
    words += ["segment_frame_length=5", "prev_segment_conditioning_frames=1", "num_frames=13", "flow_shift=3"]
    return [*words, "weights_dtype=float32", "activations_dtype=float32"]


CASES = {"one": Case(one, 8), "experts": Case(experts, 2), "segments": Case(segments, 2), "prompts": Case(prompts, 8)}


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices, processes that share them, and degrees; what context parallelism leaves is data or FSDP."""

    devices: int = 1
    processes: int = 1
    context: int = 1
    ulysses: int = 1
    rest: str = "data"

    @classmethod
    def draw(cls, rng: random.Random, heads: int) -> Mesh:
        devices = rng.choice((1, 2, 4, 8))
        context = rng.choice([n for n in (1, 2, 4, 8) if n <= devices])
        ulysses = rng.choice([n for n in (1, 2, 4, 8) if n <= context and heads % n == 0])
        processes = rng.choice((1, 2)) if devices > 1 else 1
        return cls(devices, processes, context, ulysses, rng.choice(("data", "fsdp")))

    @property
    def words(self) -> list[str]:
        rest = {"data": -1, "fsdp": 1} if self.rest == "data" else {"data": 1, "fsdp": -1}
        return [
            *("attention=ulysses_ring", f"ulysses_shards={self.ulysses}", f"ici_context_parallelism={self.context}"),
            *(f"ici_{axis}_parallelism={degree}" for axis, degree in rest.items()),
        ]

    def __str__(self) -> str:
        split = f"ring {self.context // self.ulysses} x ulysses {self.ulysses} x {self.rest}"
        return f"{self.devices // self.processes} x {self.processes}, {split}"


def command(
    words: Sequence[str], devices: int, env: Mapping[str, str], log: str, hook: Callable[[], object] = lambda: None
) -> None:
    """The body of a process: the command, with its output in a file, after `hook`."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= env
    import jax

    from maxdiffusion import cli

    hook()
    jax.config.update("jax_num_cpu_devices", devices)
    code = cli.command(words)
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    sys.exit(code)


class Life:
    """One run of the command on one mesh."""

    def __init__(self, words: Sequence[str], mesh: Mesh, log: Path, hook: Callable[[], object] | None = None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.create_server(("localhost", 0)) as free:
            address = f"localhost:{free.getsockname()[1]}"
        self.log, self.processes = log, []
        for index in range(mesh.processes):
            env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(index), "JAX_NUM_PROCESSES": "2"}
            arguments = ([*words, *mesh.words], mesh.devices // mesh.processes, env if mesh.processes > 1 else {})
            name = log if index == 0 else log.with_suffix(f".{index}")
            more = () if hook is None else (hook,)
            self.processes.append(context.Process(target=command, args=(*arguments, str(name), *more), daemon=True))
            self.processes[-1].start()

    def alive(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def states(out: Path) -> dict[str, int]:
    """The newest whole state of each video: segment x 10,000 + step."""
    found = {}
    for folder, folders, names in os.walk(out):  # which passes over what is removed meanwhile
        numbers = [int(name) for name in (*folders, *(n.removesuffix(".tar") for n in names)) if name.isdecimal()]
        if folder.endswith(".state") and numbers:
            found[os.path.basename(folder)] = max(numbers)
    return found


def saved_steps(out: Path) -> int:
    return sum(number % 10_000 for number in states(out).values())


def lines(life: Life) -> int:
    """The lines that a life wrote after its settings."""
    return len(re.findall(r"^\d\d:\d\d:\d\d ", life.text(), re.MULTILINE))


def resumed(text: str) -> list[int]:
    """The states that a life says it resumes, as `states` numbers them."""
    found = re.findall(r"resuming at step (\d+) of \d+(?: of segment (\d+))?", text)
    return sorted((int(segment or 1) - 1) * 10_000 + int(step) - 1 for step, segment in found)


def files(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() or not any(path.iterdir()))


def broken(out: Path) -> list[str]:
    """The visible files that are not whole."""
    from maxdiffusion.media.fetch import open_image
    from maxdiffusion.media.read import read_video
    from maxdiffusion.weights.latents_io import load_latents

    read: dict[str, Callable[[Path], object]] = {
        ".mp4": read_video,
        ".jpg": lambda path: open_image(str(path)).convert("RGB"),
        ".html": Path.read_text,
        ".json": lambda path: json.loads(path.read_text()),
        ".safetensors": load_latents,
    }
    found = []
    for path in out.rglob("*"):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(out).parts):
            continue
        try:
            read[path.suffix](path)
        except Exception as error:
            found.append(f"{path.name} ({error})")
    return found


def difference(out: Path, whole: Path) -> float:
    """The largest difference of any latents, relative to the largest latent of their video."""
    from maxdiffusion.weights.latents_io import load_latents

    worst = 0.0
    for path in whole.rglob("*.latents.safetensors"):
        want, got = load_latents(path)[0], load_latents(out / path.relative_to(whole))[0]
        worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
    return worst


def torture(name: str, folder: Path, kills: int, seed: int) -> list[str]:
    """Runs one case and returns its faults."""
    case, rng, faults, killed = CASES[name], random.Random(f"{name} {seed}"), [], 0
    inputs, whole, out = folder / name, folder / name / "whole", folder / name / "out"
    shutil.rmtree(inputs, ignore_errors=True)
    inputs.mkdir(parents=True)
    words = [*case.prepare(inputs), "run_name=r", f"jax_cache_dir={folder / 'cache'}", "log_level=info"]
    first = Life([*words, f"output_dir={whole}"], Mesh(), inputs / "whole.log")
    while first.alive():
        time.sleep(0.05)
    if not (expected := files(whole)):
        print(f"{name}: the undisturbed run failed: {first.text()[-2000:]}")
        return [name]
    videos = len(list(whole.rglob("*.latents.safetensors")))
    begun, lives, before = time.monotonic(), 0, {}
    while killed < kills or lives:
        lives += 1
        before_steps = saved_steps(out)
        count = lines(first) + max(STEPS * videos - before_steps, 0)
        mesh, moment, wait = Mesh.draw(rng, case.heads), rng.randint(1, count), rng.uniform(0, 0.3)
        life = Life([*words, f"output_dir={out}"], mesh, inputs / f"{killed:03}-{lives}.log")
        start = time.monotonic()
        while life.alive() and (killed == kills or lines(life) + saved_steps(out) - before_steps < moment):
            time.sleep(0.03)
        if life.alive():
            time.sleep(wait)
        cut = life.alive() and killed < kills
        if cut:
            life.kill()
            killed += 1
        text, now = life.text(), states(out)
        here = [f"{file} is half" for file in broken(out)] + ["Traceback"] * ("Traceback" in text)
        if (took := resumed(text)) and took != sorted(before.values()):
            here.append(f"resumed {took}, and the states were {sorted(before.values())}")
        if "cannot be saved" in text or "is damaged" in text:
            here += [line for line in text.splitlines() if "cannot be saved" in line or "is damaged" in line]
        last = text.splitlines()[-1][9:60] if text else "start"
        ended = not cut or files(out) == expected  # a run that dies after all its files is over
        end = f"killed at {last!r}, states {sorted(now.values()) or 'none'}" if cut else "ended"
        if not cut and any(process.exitcode for process in life.processes):
            end = f"exit codes {[process.exitcode for process in life.processes]}"
            here.append(f"a run ended by itself: {text[-1500:]}")
        elif ended:
            left, error = files(out), difference(out, whole)
            end += f", whole after {lives} lives, latents within {error:.1e}"
            here += [f"left {sorted(set(left) ^ set(expected))}"] if left != expected else []
            here += [f"latents differ by {error:.1e}"] if error > TOLERANCE else []
        at = f", resumed {took}" if took else ""
        print(f"{name:9} {killed:3} {time.monotonic() - start:5.1f} s  {mesh!s:38}{at}  {end}", flush=True)
        for fault in here:
            print(f"  FAULT {fault}", flush=True)
        faults += [f"{name}, kill {killed}: {fault}" for fault in here]
        before = now
        if ended:
            shutil.rmtree(out, ignore_errors=True)
            lives, before = 0, {}
    print(f"{name}: {killed} kills in {time.monotonic() - begun:.0f} s, {len(faults)} faults", flush=True)
    return faults


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["one"])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    fast = "--xla_backend_optimization_level=0"  # compiling is most of a life
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": fast, "PYTHONPATH": str(ROOT)}
    sys.path.insert(0, str(ROOT))
    faults = [fault for name in args.case for fault in torture(name, args.folder.resolve(), args.kills, args.seed)]
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
