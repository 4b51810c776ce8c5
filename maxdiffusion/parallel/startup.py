"""What the config says about devices, made at startup: the attention plan, the mesh and its table of logical axes."""

from __future__ import annotations

import logging
from typing import Literal

import jax

from maxdiffusion.attention.options import KernelOptions
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.config import Config
from maxdiffusion.parallel.mesh import Degrees, Devices, make_mesh, resolve
from maxdiffusion.parallel.placement import Placement
from maxdiffusion.parallel.rules import rules_for

log = logging.getLogger(__name__)


def place(cfg: Config, heads: int, devices: Devices | None = None) -> tuple[AttentionPlan, Placement]:
    """The plan and the placement of every later array, on these devices (all by default).

    Raises:
      UserError: the degrees do not fit the devices, the heads or each other.
    """
    devices = jax.devices() if devices is None else devices
    ici, dcn = resolve(_degrees(cfg, "ici"), _degrees(cfg, "dcn"), devices)
    plan = AttentionPlan.parse(
        cfg.attention,
        heads=heads,
        context=ici.context * dcn.context,
        ulysses_shards=cfg.ulysses_shards,
        platform=devices[0].platform,
        tensor=ici.tensor * dcn.tensor,
        options=KernelOptions.read(cfg),
    )
    mesh = make_mesh(ici, dcn, ulysses=plan.ulysses, devices=devices)
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    log.info("mesh: %s (%s)", shape, devices[0].device_kind)
    return plan, Placement(mesh, rules_for(cfg.logical_axis_rules))


def _degrees(cfg: Config, level: Literal["ici", "dcn"]) -> Degrees:
    if level == "ici":
        return Degrees(
            cfg.ici_data_parallelism,
            cfg.ici_fsdp_parallelism,
            cfg.ici_context_parallelism,
            cfg.ici_tensor_parallelism,
        )
    return Degrees(
        cfg.dcn_data_parallelism, cfg.dcn_fsdp_parallelism, cfg.dcn_context_parallelism, cfg.dcn_tensor_parallelism
    )
