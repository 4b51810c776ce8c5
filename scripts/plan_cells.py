"""Makes `maxdiffusion/attention/cells.json`: seconds of every split, for `ulysses_shards=auto`.

    python scripts/plan_cells.py                                            all cells, without compiling anything
    python scripts/plan_cells.py --minutes 60 --slices v6e-8 --pages wan2.1_t2v_14b    some, compiled

For each official page and size, and 8, 16 and 32 devices of each generation. Of a cell whose splits are all known from
plans that were compiled before (`plan=`, in `jax_cache_dir`) or within `--minutes` (0: none) the figures are compiled,
of any other they are modelled; a compiled cell of the table is kept where now it would be modelled.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from maxdiffusion import config, variants  # noqa: E402
from maxdiffusion.attention import cells  # noqa: E402
from maxdiffusion.hardware.chips import slice_of  # noqa: E402
from maxdiffusion.planning import analytic, command  # noqa: E402
from maxdiffusion.runtime import log  # noqa: E402
from maxdiffusion.weights import official  # noqa: E402

SLICES = [f"{name}-{count}" for name in ("v5e", "v6e", "v7x") for count in (8, 16, 32)]
SLICES += ["v5p-16", "v5p-32", "v5p-64"]  # of them a number counts two for each device
PAGES = sorted(page.stem for page in (ROOT / "configs").glob("wan2*.yml"))


def place_of(cfg: config.Config) -> cells.Place:
    tpu, configs = slice_of(cfg.plan or ""), official.configs_of(cfg)
    work = analytic.work_of(cfg, configs, tpu.generation.kind, "tpu")
    heads = configs["transformer"].num_attention_heads
    return cells.Place(work.device_kind, tpu.devices, heads, work.head_dim, work.tokens, work.branches)


def cell_of(cfg: config.Config) -> cells.Cell:
    """What a plan says of every (data, ulysses); of placements of weights the fastest that fits, where one does."""
    plan = command.make(cfg)
    source = "compiled"
    if not all(row.known for row in plan.rows):
        plan, source = command.make(cfg.model_copy(update={"plan_minutes": 1e-6, "jax_cache_dir": ""})), "modelled"
    seconds: dict[tuple[int, int], float] = {}
    for row in plan.rows:  # the best first
        seconds.setdefault((row.split.data, row.split.ulysses), row.seconds.total)
    return cells.Cell(source, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0, help="to compile each plan for")
    parser.add_argument("--slices", nargs="+", default=SLICES)
    parser.add_argument("--pages", nargs="+", default=PAGES)
    parser.add_argument("--cache", default="~/.cache/maxdiffusion/xla", help="jax_cache_dir of the plans")
    args = parser.parse_args()
    log.setup("info" if args.minutes else "warning")
    table = dict(cells.table())
    made = set()
    for page in args.pages:
        path = str(ROOT / "configs" / f"{page}.yml")
        spec = variants.get(config.load([path, "plan=v6e-8"]).model_name)
        for (width, height), name in itertools.product(spec.sizes, args.slices):
            words = [f"size={width}*{height}", f"plan={name}", f"plan_minutes={max(args.minutes, 1e-6)}"]
            cfg = config.load([path, *words, f"jax_cache_dir={args.cache}"])
            place = place_of(cfg)
            if place in made:  # of another page, or of the picture turned
                continue
            made.add(place)
            cell = cell_of(cfg)
            if cell.source == "compiled" or place not in table or table[place].source == "modelled":
                table[place] = cell
            best = min(cell.seconds, key=lambda key: cell.seconds[key])
            print(f"{page} {width}x{height} {name}: data {best[0]}, ulysses {best[1]}, {cell.source}", flush=True)
    cells.FILE.write_text(cells.dump(table), encoding="utf-8")
    print(f"{len(table)} cells, {sum(cell.source == 'compiled' for cell in table.values())} of them compiled")


if __name__ == "__main__":
    main()
