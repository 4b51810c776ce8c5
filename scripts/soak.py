"""Makes many videos by a prompt file in one process and measures that it does not grow.

    python scripts/soak.py FOLDER                # 300 videos of the smallest size
    python scripts/soak.py FOLDER --videos 50

Prints host memory, open files, threads and seconds a video along the way. Exit code 1 if, from the tenth video on,
memory grows by more than a tenth or files stay open.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("size=16*16", "num_frames=1", "output_format=png", "num_inference_steps=1", "guidance_scale=1")


def memory() -> float:
    """Resident host memory, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, default=300)
    args = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    from maxdiffusion import generate_wan, output, request

    args.folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"seed": seed, "output": f"v{seed}"}) for seed in range(args.videos)]
    (args.folder / "p.jsonl").write_text("\n".join(lines))
    words = [str(ROOT / "configs" / "wan_tiny.yml"), f"prompts={args.folder}/p.jsonl", f"output_dir={args.folder}/out"]
    words += [*SMALL, "progress=off", "log_level=warning", "run_name=r", f"jax_cache_dir={args.folder}/cache"]

    rows: list[tuple[int, float, int, int, float]] = []
    finish, begun = output.Outputs.finish, time.perf_counter()

    def measured(self: output.Outputs, files: output.Output) -> None:
        finish(self, files)
        count, threads = len(rows) + 1, threading.active_count()
        rows.append((count, memory(), len(os.listdir("/proc/self/fd")), threads, time.perf_counter() - begun))

    output.Outputs.finish = measured  # type: ignore[method-assign]
    made = generate_wan.run(request.load(words))
    print(f"{'videos':>6} {'memory MiB':>10} {'files':>5} {'threads':>7} {'s a video':>9}")
    marks = {1, 2, 5, 10, *range(50, len(rows), 50), len(rows)}
    last = (0, 0.0)
    for count, mib, files, threads, seconds in rows:
        if count in marks:
            print(f"{count:6} {mib:10.1f} {files:5} {threads:7} {(seconds - last[1]) / (count - last[0]):9.3f}")
            last = count, seconds
    tenth, end = rows[min(9, len(rows) - 1)], rows[-1]
    grown, opened = end[1] - tenth[1], end[2] - tenth[2]
    print(f"from the tenth to the last of {len(made)}: {grown:+.1f} MiB, {opened:+} open files")
    return 1 if grown > tenth[1] / 10 or opened > 0 or len(made) != args.videos else 0


if __name__ == "__main__":
    sys.exit(main())
