"""Devices of a run: the attention plan, the mesh and its table of logical axes, made once at startup."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import jax

from maxdiffusion.attention import api
from maxdiffusion.attention.plan import AttentionPlan, plans
from maxdiffusion.config.schema import Config
from maxdiffusion.denoise.recipe import Recipe
from maxdiffusion.errors import UserError
from maxdiffusion.parallel import axes
from maxdiffusion.parallel.mesh import Degrees, Devices, make_mesh, resolve
from maxdiffusion.parallel.placement import Placement
from maxdiffusion.parallel.rules import rules_for
from maxdiffusion.request import cost
from maxdiffusion.request.job import Job, kernel_options

log = logging.getLogger(__name__)


def lay_out(
    job: Job, recipe: Recipe, configs: Mapping[str, Any], devices: Devices | None = None
) -> tuple[AttentionPlan, Placement]:
    """The attention plan and the placement of every later array, on these devices (all by default).

    What the config leaves open is chosen by `cost`: the split of the context axis, and whether the guidance pair takes
    two devices of the data axis. A degree that the config gives stays. `configs` are the networks', by folder.

    Raises:
      UserError: the degrees do not fit the devices, the heads or each other, or a size does not suit the transformer.
    """
    cfg, devices = job.cfg, jax.devices() if devices is None else devices
    run = cost.Run.of(job, recipe, configs, devices[0].device_kind, devices[0].platform)
    found: dict[tuple[int, int], cost.Layout] = {}
    refused: dict[tuple[int, int], UserError] = {}
    pair = run.guided and _pair_may_split(cfg)
    for data in (1, 2) if pair and resolve(*degrees(cfg), devices)[0].context % 2 == 0 else (1,):
        legal, illegal = layouts(cfg, run, devices, data)
        found |= {(data, ulysses): layout for ulysses, layout in legal.items()}
        refused |= {(data, ulysses): error for ulysses, error in illegal.items()}
    data, ulysses = cost.choose(found, refused, run)
    plan = found[data, ulysses].attention
    if cfg.attention == "auto":
        log.info("attention=auto: kernel %s, the fastest exact one for %s here", plan.kernel, cfg.activations_dtype)
    mesh = make_mesh(*degrees(cfg, data), ulysses=ulysses, devices=devices)
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    log.info("mesh: %s (%s)", shape, devices[0].device_kind)
    placement = Placement(mesh, rules_for(cfg.logical_axis_rules))
    api.check(plan, placement)
    return plan, placement


def layouts(
    cfg: Config, run: cost.Run, devices: Devices, data: int = 1
) -> tuple[dict[int, cost.Layout], dict[int, UserError]]:
    """Ulysses degree -> layout of every legal split of these devices, and Ulysses degree -> what forbids it.

    `data` stands for ici_data_parallelism=auto.

    Raises:
      UserError: the degrees do not fit the devices, or the kernel is not available.
    """
    ici, dcn = resolve(*degrees(cfg, data), devices)
    context = ici.context * dcn.context
    legal, illegal = plans(
        cfg.attention,
        heads=run.network.num_attention_heads,
        context=context,
        slices=dcn.context,
        ulysses_shards=cfg.ulysses_shards,
        platform=run.platform,
        dtype=cfg.activations_dtype,
        tensor=ici.tensor * dcn.tensor,
        options=kernel_options(cfg),
        chunks=cfg.ulysses_attention_chunks,
        ring_direction=cfg.ring_direction,
    )
    sharded = axes.RING in (rules_for(cfg.logical_axis_rules)[axes.EMBED] or ())
    shared = (ici.data * dcn.data, ici.fsdp * dcn.fsdp, context, sharded, dcn.context)
    return {ulysses: cost.Layout(plan, *shared) for ulysses, plan in legal.items()}, illegal


def _pair_may_split(cfg: Config) -> bool:
    """Whether the two branches of guidance may run on two devices of the data axis as well as in one batch."""
    return (
        cfg.ici_data_parallelism == "auto"
        and cfg.ici_context_parallelism == -1
        and cfg.ulysses_shards == -1
        and cfg.attention in ("auto", "ulysses_ring")
        and cfg.guidance_mode != "two_pass"
        and not cfg.decode_latents
    )


def degrees(cfg: Config, data: int = 1) -> tuple[Degrees, Degrees]:
    """Inside a slice and over slices, as given; `data` stands for ici_data_parallelism=auto."""
    ici = Degrees(
        data if cfg.ici_data_parallelism == "auto" else cfg.ici_data_parallelism,
        cfg.ici_fsdp_parallelism,
        cfg.ici_context_parallelism,
        cfg.ici_tensor_parallelism,
    )
    dcn = Degrees(
        cfg.dcn_data_parallelism, cfg.dcn_fsdp_parallelism, cfg.dcn_context_parallelism, cfg.dcn_tensor_parallelism
    )
    return ici, dcn
