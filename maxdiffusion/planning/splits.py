"""The ways to split a run over devices, as words for the command line; what the user gave stays as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.config import Config
from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes, resolve
from maxdiffusion.planning.results import Refused, Split
from maxdiffusion.request import Job, on_mesh
from maxdiffusion.request import layout as layout_of
from maxdiffusion.request.cost import Layout, Run

_SHARDED: tuple[str, tuple[str, ...]] = (axes.EMBED, ("fsdp", "context"))


def splits(job: Job, run: Run, devices: int) -> tuple[dict[Split, Layout], tuple[Refused, ...]]:
    """Every legal split of that many devices, and what forbids the others.

    What the config leaves open: data (the guidance pair, or several videos), Ulysses, and whether weights are sharded
    over the context axis.

    Raises:
      UserError: nothing is legal.
    """
    cfg, found = job.cfg, dict[Split, Layout]()
    refused: list[Refused] = []
    for data in _data(cfg, run, devices):
        words = () if data is None else (f"ici_data_parallelism={data}",)
        name = f"data {data}" if data else "these degrees"
        try:
            tried, here = on_mesh(job, words).cfg, [None] * devices
            ici, _ = resolve(*layout_of.degrees(tried), here)
            legal, illegal = layout_of.layouts(tried, run, here)
        except UserError as error:
            refused.append(Refused(name, str(error)))
            continue
        pair = f"data {ici.data} x " if ici.data > 1 else ""
        for ulysses, reason in illegal.items():
            refused.append(Refused(f"{pair}ring {ici.context // ulysses} x ulysses {ulysses}", str(reason)))
        for ulysses, layout in legal.items():
            plan = layout.attention
            own = (*words, f"ulysses_shards={ulysses}") if _open(cfg, plan) else words
            for sharded, rules in _weights(cfg, layout.context):
                degrees = (layout.data, layout.fsdp, layout.context, plan.ring, ulysses, plan.tensor)
                found[Split(*degrees, sharded, (*own, *rules))] = dataclasses.replace(layout, sharded=sharded)
    if not found:
        raise UserError(refused[-1].reason)
    return found, tuple(refused)


def _data(cfg: Config, run: Run, devices: int) -> Iterator[int | None]:
    """Degrees of the data axis that are worth a try; None leaves what is given."""
    if cfg.ici_data_parallelism != "auto":
        yield None
        return
    pair = run.guided and cfg.guidance_mode != "two_pass"
    rows = (1 + pair) * run.videos
    # One device has no choice; of several, every number that keeps all of them busy.
    yield from (n for n in range(1, devices + 1) if devices % n == 0 and rows % n == 0)


def _open(cfg: Config, plan: AttentionPlan) -> bool:
    return cfg.ulysses_shards == -1 and plan.context > 1 and cfg.attention in ("auto", "ulysses_ring")


def _weights(cfg: Config, context: int) -> Iterator[tuple[bool, tuple[str, ...]]]:
    """Whether weights are spread over the context axis, and the word for it."""
    given = dict(cfg.logical_axis_rules)
    if axes.EMBED in given or cfg.ici_fsdp_parallelism != 1:
        yield "context" in (given.get(axes.EMBED) or ()), ()
        return
    yield False, ()
    if context > 1:
        yield True, (f"logical_axis_rules={_flow([_SHARDED, *cfg.logical_axis_rules])}",)


def _flow(value: object) -> str:
    """A list as YAML takes it on one line."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_flow, value))}]"
    return "null" if value is None else str(value)
