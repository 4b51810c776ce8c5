"""Splits whose time was planned ahead, for `ulysses_shards=auto`: a table that `scripts/plan_cells.py` makes.

A cell holds the predicted seconds of a whole run for every (data, ulysses) of one attention on so many devices of one
kind: `compiled`, where every split of an official model was, or `modelled` by `planning.analytic`, which counts what
the rule in `auto` leaves out, the linear layers and the VAE.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

from maxdiffusion.attention.options import DEFAULT
from maxdiffusion.attention.plan import AttentionPlan

FILE = Path(__file__).with_name("cells.json")


@dataclasses.dataclass(frozen=True)
class Place:
    """What a cell is for.

    Attributes:
      kind: `device_kind`.
      devices: that share a run.
      heads: of the transformer's attention.
      head_dim: values of one.
      tokens: of one video.
      branches: of guidance.
    """

    kind: str
    devices: int
    heads: int
    head_dim: int
    tokens: int
    branches: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """Where its figures come from, and (data, ulysses) -> seconds."""

    source: str
    seconds: Mapping[tuple[int, int], float]


def find(
    found: Mapping[tuple[int, int], AttentionPlan], kind: str, head_dim: int, tokens: int, branches: int
) -> Cell | None:
    """The cell that knows every plan of `found`, by (data, ulysses); None where there is none."""
    places = {
        Place(kind, data * plan.context, plan.heads or 0, head_dim, tokens, branches)
        for (data, _), plan in found.items()
        if (plan.kernel, plan.options, plan.chunks, plan.tensor) == ("flash", DEFAULT, 1, 1)
    }
    cell = table().get(next(iter(places))) if len(places) == 1 else None
    return cell if cell and found.keys() <= cell.seconds.keys() else None


@functools.cache
def table() -> Mapping[Place, Cell]:
    """Every cell that is shipped."""
    return parse(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def parse(text: str) -> dict[Place, Cell]:
    """The inverse of `dump`."""
    names = [field.name for field in dataclasses.fields(Place)]
    return {
        Place(**{name: row[name] for name in names}): Cell(
            row["source"], {(data, ulysses): seconds for data, ulysses, seconds in row["seconds"]}
        )
        for row in json.loads(text)
    }


def dump(cells: Mapping[Place, Cell]) -> str:
    """As the file holds them: one cell a line, its seconds as [data, ulysses, seconds]."""
    rows = [
        {
            **dataclasses.asdict(place),
            "source": cell.source,
            "seconds": [[*key, float(f"{seconds:.4g}")] for key, seconds in sorted(cell.seconds.items())],
        }
        for place, cell in sorted(cells.items(), key=lambda item: dataclasses.astuple(item[0]))
    ]
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
