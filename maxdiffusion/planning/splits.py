"""Legal splits of a run over devices, as command-line arguments; keys that the user gave stay as they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from maxdiffusion.config import Config
from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes, resolve
from maxdiffusion.planning.results import Refused, Words
from maxdiffusion.request import layout as layout_of
from maxdiffusion.request import on_mesh
from maxdiffusion.request.cost import Layout, Run


def splits(run: Run, devices: int) -> tuple[dict[Words, Layout], tuple[Refused, ...]]:
    """The legal splits of that many devices by their arguments, and the illegal ones.

    Varies the keys that the config leaves open: the data degree (the guidance pair, windows, or several videos), the
    Ulysses degree, and whether weights are sharded over the context axis.

    Raises:
      UserError: nothing is legal.
    """
    job, cfg, found = run.job, run.job.cfg, dict[Words, Layout]()
    refused: list[Refused] = []
    for data in _data(run, devices):
        words = () if data is None else (f"ici_data_parallelism={data}",)
        try:
            tried, here = on_mesh(job, words).cfg, [None] * devices
            ici, _ = resolve(*layout_of.degrees(tried), here)
            legal, illegal = layout_of.legal_plans(tried, run.network, run.platform, here)
        except UserError as error:
            refused.append(Refused(f"data {data}" if data else "these degrees", str(error)))
            continue
        pair = f"data {ici.data} x " if ici.data > 1 else ""
        for ulysses, reason in illegal.items():
            refused.append(Refused(f"{pair}ring {ici.context // ulysses} x ulysses {ulysses}", str(reason)))
        for ulysses, plan in legal.items():
            layout = layout_of.layout(tried, plan, here)
            free = cfg.ulysses_shards == -1 and cfg.attention in ("auto", "ulysses_ring")
            own = (f"ulysses_shards={ulysses}",) if free and layout.attention.context > 1 else ()
            for sharded, rules in _weights(cfg, layout.context):
                found[*words, *own, *rules] = dataclasses.replace(layout, sharded=sharded)
    if not found:
        raise UserError(refused[-1].reason)
    return found, tuple(refused)


def _data(run: Run, devices: int) -> Iterator[int | None]:
    """Degrees of the data axis worth trying; None leaves the given one."""
    cfg = run.job.cfg
    if cfg.ici_data_parallelism != "auto":
        yield None
        return
    pair = run.guided and cfg.guidance_mode != "two_pass"
    windows = 1 if run.job.windows is None else len(run.job.windows.starts)
    rows = (1 + pair) * len(run.job.videos) * windows
    # One device has no choice; of several, every number that keeps all of them busy.
    yield from (n for n in range(1, devices + 1) if devices % n == 0 and rows % n == 0)


def _weights(cfg: Config, context: int) -> Iterator[tuple[bool, Words]]:
    """Whether weights are sharded over the context axis, and the argument for it."""
    given = dict(cfg.logical_axis_rules)
    if axes.EMBED in given or cfg.ici_fsdp_parallelism != 1:
        yield "context" in (given.get(axes.EMBED) or ()), ()
        return
    yield False, ()
    if context > 1:
        rules = json.dumps([[axes.EMBED, ["fsdp", "context"]], *cfg.logical_axis_rules], separators=(",", ":"))
        yield True, ("logical_axis_rules=" + rules.replace('"', ""),)
