"""Draws docs/parallelism.svg: the tokens and heads of each of eight devices, read from the shardings of a mesh.

    python scripts/draw_parallelism.py [--ring 2] [--ulysses 4] [--file docs/parallelism.svg]

Each panel is the array of 16 token blocks x 8 heads, coloured by the device that holds the part.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from maxdiffusion.parallel import Degrees, axes, make_mesh

TOKENS, HEADS = 16, 8
COLOURS = ("#4878a8", "#6aa56a", "#c9a94f", "#c0504d", "#7f6fa8", "#4d9f9f", "#b5763a", "#888888")
CELL, GAP, TOP = 14, 96, 86


def holders(mesh: Mesh, spec: PartitionSpec) -> np.ndarray:
    """The number of the device of each (token block, head); -1 where several devices hold a copy."""
    held = np.full((TOKENS, HEADS), -2)
    for device, index in NamedSharding(mesh, spec).devices_indices_map((TOKENS, HEADS)).items():
        held[index] = np.where(held[index] == -2, device.id, -1)
    return held


def panel(x: int, title: str, lines: list[str], held: np.ndarray) -> Iterator[str]:
    yield f'<text x="{x}" y="24" font-weight="bold">{title}</text>'
    for number, line in enumerate(lines):
        yield f'<text x="{x}" y="{42 + 15 * number}" font-size="11" fill="#555">{line}</text>'
    for (token, head), device in np.ndenumerate(held):
        place = f'x="{x + CELL * head}" y="{TOP + CELL * token}" width="{CELL - 1}" height="{CELL - 1}"'
        yield f'<rect {place} fill="{COLOURS[device]}"/>'
    for device in sorted(set(held.ravel())):
        token, head = np.argwhere(held == device).mean(axis=0)
        at = f'x="{x + CELL * (head + 0.5):.1f}" y="{TOP + CELL * (token + 0.5) + 4:.1f}"'
        yield f'<text {at} fill="white" font-size="11" font-weight="bold" text-anchor="middle">{device}</text>'


def arrows(x: int, ring: int) -> Iterator[str]:
    """From each ring shard to the next one, as `attention.ring` sends keys and values; the last sends to the first."""
    height = CELL * TOKENS / ring
    for shard in range(ring - 1):
        y, after = TOP + height * (shard + 0.5), TOP + height * (shard + 1.5)
        yield f'<path d="M{x} {y:.0f} C{x + 28} {y:.0f} {x + 28} {after:.0f} {x + 4} {after:.0f}" class="hop"/>'
    first, last = TOP + height * 0.3, TOP + CELL * TOKENS - height * 0.3
    yield f'<path d="M{x} {last:.0f} C{x + 56} {last:.0f} {x + 56} {first:.0f} {x + 4} {first:.0f}" class="hop"/>'


def draw(ring: int, ulysses: int) -> str:
    mesh = make_mesh(Degrees(context=ring * ulysses), ulysses=ulysses)
    spread = holders(mesh, PartitionSpec(axes.CONTEXT, None))
    exchanged = holders(mesh, PartitionSpec(axes.RING, axes.ULYSSES))
    step = CELL * HEADS + GAP
    width, height = 3 * step + 40, TOP + CELL * TOKENS + 30
    part, heads = f"1/{ring} of the tokens,", f"1/{ulysses} of the heads"
    hops = ["queries stay; keys and values", f"make {ring - 1} hop{'s' * (ring > 2)}"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#333"/></marker></defs>',
        "<style>.hop{fill:none;stroke:#333;stroke-width:1.4;marker-end:url(#head)}</style>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *panel(20, "1  between attentions", [f"1/{ring * ulysses} of the tokens,", "every head"], spread),
        *panel(20 + step, f"2  Ulysses {ulysses}: all-to-all", [part, heads], exchanged),
        *panel(20 + 2 * step, f"3  ring {ring}: keys travel", hops, exchanged),
        *arrows(20 + 2 * step + CELL * HEADS, ring),
        f'<text x="20" y="{height - 8}" font-size="11" fill="#555">rows: tokens of the video; columns: heads; '
        "number and colour: the device</text>",
        "</svg>\n",
    ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ring", type=int, default=2)
    parser.add_argument("--ulysses", type=int, default=4)
    parser.add_argument("--file", type=Path, default=Path("docs/parallelism.svg"))
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.ring * args.ulysses)
    args.file.write_text(draw(args.ring, args.ulysses), encoding="utf-8")


if __name__ == "__main__":
    main()
