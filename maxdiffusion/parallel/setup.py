"""From the config's parallelism keys to the attention plan and the placement of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.parallel.mesh import Degrees, make_mesh, resolve
from maxdiffusion.parallel.placement import Placement
from maxdiffusion.parallel.rules import rules_for

if TYPE_CHECKING:
    from maxdiffusion.config import Config


def setup(cfg: Config, *, heads: int, devices: Sequence[jax.Device] | None = None) -> tuple[AttentionPlan, Placement]:
    """The plan and the placement that `cfg` means on these devices (all by default), for a model of so many heads.

    Raises:
      UserError: degrees, heads and devices do not fit, or a logical axis rule names an axis that does not exist.
    """
    devices = jax.devices() if devices is None else devices
    ici, dcn = resolve(
        Degrees(
            cfg.ici_data_parallelism,
            cfg.ici_fsdp_parallelism,
            cfg.ici_context_parallelism,
            cfg.ici_tensor_parallelism,
        ),
        Degrees(
            cfg.dcn_data_parallelism,
            cfg.dcn_fsdp_parallelism,
            cfg.dcn_context_parallelism,
            cfg.dcn_tensor_parallelism,
        ),
        devices,
    )
    plan = AttentionPlan.parse(
        cfg.attention,
        heads=heads,
        context=ici.context * dcn.context,
        ulysses_shards=cfg.ulysses_shards,
        platform=devices[0].platform,
        tensor=ici.tensor * dcn.tensor,
    )
    mesh = make_mesh(ici, dcn, ulysses=plan.ulysses, devices=devices)
    return plan, Placement(mesh, rules_for(cfg.logical_axis_rules))
