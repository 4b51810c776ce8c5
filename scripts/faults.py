"""Injects one fault after another into a run of the miniature, runs the same command again and prints the outcome.

    python scripts/faults.py FOLDER
    python scripts/faults.py FOLDER --only kill 503

`survived`: the run itself ended well, or the same command made the same latents afterwards. `lost`: the steps that were
computed twice. `message`: the last line of the run that the fault met. A full disk is a tmpfs of some kB, and a folder
that turns read-only has such a tmpfs over it, where this process may mount one; elsewhere a limit on the size of a file
stands for the first, and the second is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from kill_and_resume import ROOT, TOLERANCE, Life, Mesh, resumed, states

STEPS = 20
WORDS = [str(ROOT / "configs" / "wan_tiny.yml"), "size=48*32", "num_frames=5", f"num_inference_steps={STEPS}"]
WORDS += ["checkpoint_steps=1", "run_name=r", "log_level=info"]


class Place:
    """Where a fault's run writes: `output_dir` as its words have it, and the local folder behind it."""

    def __init__(self, folder: Path, name: str, *more: str) -> None:
        self.folder, self.out = folder, folder / name.replace(" ", "-")
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.words = [*WORDS, f"output_dir={self.out}", f"jax_cache_dir={folder / 'cache'}", *more]
        self.hook: Callable[[], object] | None = None
        self.count = 0

    def start(self, mesh: Mesh | None = None, hook: Callable[[], object] | None = None) -> Life:
        self.count += 1
        log = self.out.with_name(f"{self.out.name}-{self.count}.log")
        log.unlink(missing_ok=True)
        return Life(self.words, mesh or Mesh(), log, hook or self.hook)

    def step(self) -> int:
        """The newest step whose state is saved."""
        return max((number for number in states(self.out).values()), default=0)

    def at_step(self, life: Life, step: int) -> None:
        """Waits until the state after that step is saved."""
        while life.alive() and self.step() < step:
            time.sleep(0.02)


def end(life: Life, timeout: float = 300) -> list[int | None]:
    """Exit codes, once all its processes have ended."""
    deadline = time.monotonic() + timeout
    while life.alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    codes = [process.exitcode for process in life.processes]
    life.kill()
    return codes


def kill(place: Place) -> Life:
    life = place.start()
    place.at_step(life, 6)
    life.kill()
    return life


def terminate(place: Place) -> Life:
    life = place.start()
    place.at_step(life, 6)
    os.kill(life.processes[0].pid, signal.SIGTERM)
    return life


def vanished(place: Place) -> Life:
    life = place.start()
    place.at_step(life, 6)
    shutil.rmtree(place.out / "r", ignore_errors=True)
    return life


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))


def full(place: Place) -> Life:
    life = place.start(hook=None if os.path.ismount(place.out) else small_files)
    if os.path.ismount(place.out):
        place.at_step(life, 6)
        with contextlib.suppress(OSError), (place.out / "filler").open("wb") as file:
            while True:
                file.write(bytes(1024))
                file.flush()
    end(life)
    (place.out / "filler").unlink(missing_ok=True)
    return life


def read_only(place: Place) -> Life | None:
    life = place.start()
    place.at_step(life, 6)
    with mounted(place.out / "r", "ro") as there:  # over the folder: with files open none can be made read-only
        end(life)
    return life if there else None


def refusing_bucket(root: Path, sign: Path) -> None:
    """Registers a bucket below `root` that answers 503 while the file `sign` exists."""
    from tests.support.bucket import Bucket, register

    register(root)
    pipe, put = Bucket.pipe_file, Bucket.put_file

    def refused(self: Bucket, *args: object, of: Callable[..., object], **more: object) -> object:
        if sign.exists():
            raise RuntimeError("503 Service Unavailable")
        return of(self, *args, **more)

    Bucket.pipe_file = functools.partialmethod(refused, of=pipe)
    Bucket.put_file = functools.partialmethod(refused, of=put)


def unavailable(place: Place) -> Life:
    sign = place.out / "503"
    (place.out / "b").mkdir()
    place.words += ["output_dir=gs://b"]
    place.words.remove(f"output_dir={place.out}")
    place.hook = functools.partial(refusing_bucket, place.out, sign)
    life = place.start()
    place.at_step(life, 6)
    sign.touch()
    end(life)
    sign.unlink()
    return life


def host_dies(place: Place) -> Life:
    life = place.start(Mesh(devices=4, processes=2, context=4, ulysses=2))
    place.at_step(life, 6)
    life.processes[1].kill()
    return life


def jumping_clock() -> None:
    """Lets the clock of this process jump back by an hour, and later forward by two, every few seconds."""
    real, began = time.time, time.monotonic()
    time.time = lambda: real() + (0, -3600, 3600)[int((time.monotonic() - began) / 3) % 3]


def clock(place: Place) -> Life:
    life = place.start(hook=jumping_clock)
    place.at_step(life, 14)
    life.kill()
    return life


def twice(place: Place) -> Life:
    first = place.start()
    place.at_step(first, 1)
    second = place.start()
    codes = end(second), end(first)
    assert codes[1] == [0], first.text()
    return second


FAULTS: dict[str, tuple[Callable[[Place], Life | None], tuple[str, ...]]] = {
    "kill": (kill, ()),
    "SIGTERM": (terminate, ()),
    "disk full": (full, ()),
    "read-only": (read_only, ()),
    "folder vanishes": (vanished, ()),
    "503": (unavailable, ()),
    "a host dies": (host_dies, ()),
    "clock jumps": (clock, ()),
    "two of one name": (twice, ("save_file={}/one.mp4",)),
}


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """A tmpfs on the folder; False where none can be mounted."""
    words = ["-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    there = shutil.which("mount") and subprocess.run(["mount", *words], capture_output=True).returncode == 0
    try:
        yield bool(there)
    finally:
        if there:
            subprocess.run(["umount", "-l", folder], check=True)


def fault(out: Path, whole: Path) -> str:
    """What is wrong with the only video of a folder; empty if nothing is."""
    from maxdiffusion.weights.latents_io import load_latents

    found, wanted = (sorted(folder.rglob("*.latents.safetensors")) for folder in (out, whole))
    if len(found) != 1 or len(list(out.rglob("*.mp4"))) != 1:
        return f"{len(found)} latents"
    got, want = (load_latents(path)[0] for path in (found[0], wanted[0]))
    error = float(np.abs(got - want).max() / np.abs(want).max())
    return "" if error <= TOLERANCE else f"latents differ by {error:.0e}"


def row(name: str, folder: Path, whole: Path) -> bool:
    """Injects the fault, runs the command again and prints the row; whether nothing but steps was lost."""
    inject, more = FAULTS[name]
    place = Place(folder, name)
    place.words += [word.format(place.out) for word in more]
    with contextlib.ExitStack() as stack:
        if name == "disk full" and not stack.enter_context(mounted(place.out, "size=512k")):
            name += " (a limit on files)"
        if (life := inject(place)) is None:
            print(f"{name:16} left out: no tmpfs can be mounted here")
            return True
        codes, message = end(life), (life.text().strip().splitlines() or [""])[-1]
        lost, again = "0 steps", life
        if name != "two of one name" and any(codes):
            done, again = STEPS if "denoise done" in life.text() else place.step(), place.start()
            end(again)
            took = resumed(again.text())
            decoded = "holds the latents of an earlier run" in again.text()
            lost = "0 steps" if decoded else f"{done - took[0]} steps" if took else "all steps"
        survived = fault(place.out, whole)
        hidden = [path for path in place.out.rglob(".*") if path.suffix in (".state", ".part", ".lock", ".draw")]
        # The folder that stands for a bucket keeps folders that are empty, which a bucket does not have.
        left = [path.name for path in hidden if path.is_file() or any(path.iterdir())]
        survived = survived or (f"left {' '.join(left)}" if left else "")
        print(
            f"{name:16} {codes!s:10} {f'NO: {survived}' if survived else 'yes':8} {lost:10} {message[:200]}", flush=True
        )
    return not survived


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    args = parser.parse_args(argv)
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    sys.path.insert(0, str(ROOT))
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    multiprocessing.util.get_temp_dir()  # of sockets, whose paths are short, chosen before the next line
    os.environ["TMPDIR"] = str(folder / "tmp")  # where latents go that cannot be saved
    undisturbed = Place(folder, "undisturbed")
    if end(life := undisturbed.start()) != [0]:
        print(life.text())
        return 1
    print(f"{'fault':16} {'exit':10} {'survived':8} {'lost':10} message")
    good = [row(name, folder, undisturbed.out) for name in args.only]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
