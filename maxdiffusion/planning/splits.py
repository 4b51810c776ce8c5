"""The ways to split a run over devices, as words for the command line; what the user gave stays as it is."""

from __future__ import annotations

from collections.abc import Iterator

from maxdiffusion.attention.options import KernelOptions
from maxdiffusion.attention.plan import AttentionPlan, plans
from maxdiffusion.config import Config
from maxdiffusion.config.examples import examples
from maxdiffusion.config.load import replaced
from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes, resolve, startup
from maxdiffusion.planning.results import Refused, Split

_SHARDED: tuple[str, tuple[str, ...]] = (axes.EMBED, ("fsdp", "context"))


def splits(
    cfg: Config, heads: int, devices: int, platform: str
) -> tuple[dict[Split, AttentionPlan], tuple[Refused, ...]]:
    """Every legal split of that many devices with its attention, and what forbids the others.

    Open are, where `cfg` leaves them so: data (the guidance pair, or several videos), Ulysses, and whether weights are
    spread over the context axis.

    Raises:
      UserError: nothing is legal.
    """
    found: dict[Split, AttentionPlan] = {}
    refused: list[Refused] = []
    for data in _data(cfg, devices):
        words = () if data is None else (f"ici_data_parallelism={data}",)
        name = f"data {data}" if data else "these degrees"
        try:
            tried = replaced(cfg, words)
            ici, dcn = resolve(*startup.degrees(tried), [None] * devices)
            legal, illegal = plans(
                tried.attention,
                heads=heads,
                context=ici.context * dcn.context,
                ulysses_shards=tried.ulysses_shards,
                platform=platform,
                dtype=tried.activations_dtype,
                tensor=ici.tensor * dcn.tensor,
                options=KernelOptions.read(tried),
                chunks=tried.ulysses_attention_chunks,
                ring_direction=tried.ring_direction,
            )
        except UserError as error:
            refused.append(Refused(name, str(error)))
            continue
        pair = f"data {ici.data} x " if ici.data > 1 else ""
        for ulysses, reason in illegal.items():
            refused.append(Refused(f"{pair}ring {ici.context // ulysses} x ulysses {ulysses}", str(reason)))
        for ulysses, plan in legal.items():
            own = (*words, f"ulysses_shards={ulysses}") if _open(cfg, plan) else words
            for sharded, rules in _weights(cfg, ici.context):
                split = Split(ici.data, ici.fsdp, ici.context, plan.ring, ulysses, ici.tensor, sharded, (*own, *rules))
                found[split] = plan
    if not found:
        raise UserError(refused[-1].reason)
    return found, tuple(refused)


def _data(cfg: Config, devices: int) -> Iterator[int | None]:
    """Degrees of the data axis that are worth a try; None leaves what is given."""
    if cfg.ici_data_parallelism != "auto":
        yield None
        return
    branches = 2 if cfg.guidance_scale > 1 and cfg.guidance_mode != "two_pass" else 1
    rows = branches * len(examples(cfg))
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
