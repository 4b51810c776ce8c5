"""`ulysses_shards=auto`: the fastest split of the devices, as planned ahead (`cells`) or by a rule; imports no jax.

Seconds of one layer's self-attention, for both branches of guidance:

    ring x (hop + layout) + (ring - 1) x (merge + max(0, rotation - hop)) + 4 all-to-alls

  hop       4 x examples x heads x queries x keys x head_dim / rate, queries and keys padded to the kernel's blocks
  layout    k and v into the kernel's order and blocks, its output out of it: 14 bytes per value / memory bandwidth
  merge     two fp32 results into one: 12 bytes per value / memory bandwidth
  rotation  a device's k and v over the link to the next ring shard
  all-to-all  of a device's share of q, k, v or the output

Figures of devices and the time of collectives are those of `hardware.chips` and `hardware.links`: public ones and
static counts of kernels, nothing was timed; all of this is modelled.
Left out, as it is the same for every split or small: linear layers, cross-attention, overlap by chunks; and that the
VAE, which splits width over the context axis, has half the devices where the guidance pair takes the data axis.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from types import MappingProxyType

from maxdiffusion.attention import cells
from maxdiffusion.attention.block_sizes import blocks, flash_blocks
from maxdiffusion.attention.options import TAKEN
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.hardware import links
from maxdiffusion.hardware.chips import GENERATIONS, KINDS, Machine

log = logging.getLogger(__name__)


# Devices that are in no table: of a GPU and a CPU, and of a TPU of another generation.
PLATFORMS: Mapping[str, Machine] = MappingProxyType(
    {
        "cpu": Machine(0.1e12, 20e9, 10e9),
        "gpu": Machine(400e12, 3000e9, 400e9),
        "tpu": GENERATIONS["v6e"].machine,
    }
)


@dataclasses.dataclass(frozen=True)
class Work:
    """One layer: tokens of a video, values per head, the branches of guidance that run in one batch, and where."""

    tokens: int
    head_dim: int
    branches: int
    device_kind: str
    platform: str
    slices: int = 1  # that the context axis spans


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds per layer."""

    compute: float
    exchange: float
    rotation: float  # what of it no kernel hides
    passes: float  # layout and merges

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.rotation + self.passes

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in dataclasses.asdict(self).items())
        return f"{1e3 * self.total:.1f} ms per layer ({parts})"


def cost(plan: AttentionPlan, data: int, work: Work) -> Cost:
    """The rule above, for a plan whose `heads` are known, with the branches over `data` devices."""
    assert plan.heads is not None
    machine = KINDS[work.device_kind].machine if work.device_kind in KINDS else PLATFORMS[work.platform]
    examples = -(-work.branches // data)
    heads = plan.heads // plan.tensor
    shard = -(-work.tokens // plan.context)
    block = shard * plan.ulysses
    queries = keys = block
    if "block_q" in TAKEN[plan.kernel]:
        own = plan.kernel == "flash"  # which skips what is padding in a block of keys
        sizes = (flash_blocks if own else blocks)(work.device_kind, block, block, plan.options)
        queries, keys = (-(-block // size) * size for size in (sizes.q, sizes.compute if own else sizes.kv))
    values = examples * shard * heads * work.head_dim
    hop = 4 * examples * (heads // plan.ulysses) * queries * keys * work.head_dim / machine.attention
    hops = plan.ring - 1
    share = 2 * values  # bytes of q, k, v or the output
    context, ulysses = ((degree, max(1, degree // machine.cores)) for degree in (plan.context, plan.ulysses))
    if work.slices > 1:
        rotation = links.between_slices(2 * share, machine)
    else:
        rotation = links.permute(2 * share, *context, machine)
    return Cost(
        compute=plan.ring * hop,
        exchange=4 * links.all_to_all(share, *ulysses, machine),
        rotation=hops * max(0.0, rotation - hop),
        passes=(14 * plan.ring + 12 * hops) * values / machine.memory,
    )


def choose(
    found: Mapping[tuple[int, int], AttentionPlan], refused: Mapping[tuple[int, int], UserError], work: Work
) -> tuple[int, int]:
    """The key (data, ulysses) of the fastest plan; logs it, the others by time, and why the refused ones are illegal.

    Where there is one plan and nothing else was thinkable, nothing is logged.

    Raises:
      UserError: nothing is legal; the reason is that of the largest Ulysses.
    """
    if not found:
        raise refused[max(refused)]
    if len(found) == 1 and not refused:
        return next(iter(found))
    cell = cells.find(found, work.device_kind, work.head_dim, work.tokens, work.branches) if work.slices == 1 else None
    if cell:
        seconds = {key: cell.seconds[key] for key in found}
        shown = {
            key: f"planned ({cell.source}) {each:.0f} s for a run of the defaults" for key, each in seconds.items()
        }
    else:
        costs = {key: cost(plan, key[0], work) for key, plan in found.items()}
        seconds = {key: each.total for key, each in costs.items()}
        shown = {key: f"modelled {each}" for key, each in costs.items()}
    best, *others = sorted(seconds, key=lambda key: seconds[key])
    log.info("ulysses_shards=auto: %s, %s", _name(best, found[best]), shown[best])
    for key in others:
        log.info("  rather than %s, %s", _name(key, found[key]), shown[key])
    for (data, ulysses), reason in refused.items():
        log.info("  not data %d, ulysses %d: %s", data, ulysses, reason)
    return best


def _name(key: tuple[int, int], plan: AttentionPlan) -> str:
    pair = f"the guidance pair over data {key[0]}, " if key[0] > 1 else ""
    return f"{pair}ring {plan.ring} x ulysses {plan.ulysses}"
