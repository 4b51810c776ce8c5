"""Devices of a run: the attention plan, the mesh and its table of logical axes, made once at startup."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from maxdiffusion.attention import api
from maxdiffusion.attention.plan import AttentionPlan, plans
from maxdiffusion.config.schema import Config
from maxdiffusion.denoise.recipe import Recipe
from maxdiffusion.errors import UserError
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.parallel import axes
from maxdiffusion.parallel.mesh import Degrees, Devices, make_mesh, resolve
from maxdiffusion.parallel.placement import Placement
from maxdiffusion.parallel.rules import rules_for
from maxdiffusion.request.job import Job, kernel_options
from maxdiffusion.runtime import distributed

if TYPE_CHECKING:
    from maxdiffusion.request.cost import Layout

log = logging.getLogger(__name__)


def lay_out(
    job: Job, recipe: Recipe, configs: Mapping[str, Any], devices: Devices | None = None
) -> tuple[AttentionPlan, Placement]:
    """The attention plan and the placement of every later array, on these devices (all by default).

    Open choices are made by `cost`: the split of the context axis, and whether the guidance pair takes two
    devices of the data axis. A degree that the config gives stays. `configs` are the networks', by folder.

    Raises:
      UserError: the degrees do not fit the devices, the heads or each other, or a size does not suit the transformer.
    """
    cfg, devices, network = job.cfg, distributed.devices() if devices is None else devices, configs["transformer"]
    job.max_tokens(network)  # the sizes suit it
    legal: dict[tuple[int, int], AttentionPlan] = {}
    refused: dict[tuple[int, int], UserError] = {}
    pair = recipe.guided and _pair_may_split(cfg)
    for data in (1, 2) if pair and resolve(*degrees(cfg), devices)[0].context % 2 == 0 else (1,):
        found, illegal = legal_plans(cfg, network, devices[0].platform, devices, data)
        legal |= {(data, ulysses): plan for ulysses, plan in found.items()}
        refused |= {(data, ulysses): error for ulysses, error in illegal.items()}
    if not legal:
        raise refused[max(refused)]  # of the largest Ulysses degree
    choice = next(iter(legal))
    if len(legal) > 1 or refused:
        from maxdiffusion.request import cost

        run = cost.Run.of(job, recipe, configs, devices[0].device_kind, devices[0].platform)
        layouts = {key: layout(cfg, plan, devices, key[0]) for key, plan in legal.items()}
        choice = cost.choose(layouts, refused, run)
    plan = legal[choice]
    if cfg.attention == "auto":
        log.info("attention=auto: kernel %s, the fastest exact one for %s here", plan.kernel, cfg.activations_dtype)
    mesh = make_mesh(*degrees(cfg, choice[0]), ulysses=choice[1], devices=devices)
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    log.info("mesh: %s (%s)", shape, devices[0].device_kind)
    placement = Placement(mesh, rules_for(cfg.logical_axis_rules))
    api.check(plan, placement)
    return plan, placement


def legal_plans(
    cfg: Config, network: DiTConfig, platform: str, devices: Devices, data: int = 1
) -> tuple[dict[int, AttentionPlan], dict[int, UserError]]:
    """Ulysses degree -> plan of every legal split of these devices, and Ulysses degree -> what forbids it.

    `data` stands for ici_data_parallelism=auto.

    Raises:
      UserError: the degrees do not fit the devices, or the kernel is not available.
    """
    ici, dcn = resolve(*degrees(cfg, data), devices)
    return plans(
        cfg.attention,
        heads=network.num_attention_heads,
        context=ici.context * dcn.context,
        slices=dcn.context,
        ulysses_shards=cfg.ulysses_shards,
        platform=platform,
        dtype=cfg.activations_dtype,
        tensor=ici.tensor * dcn.tensor,
        options=kernel_options(cfg),
        chunks=cfg.ulysses_attention_chunks,
        ring_direction=cfg.ring_direction,
        quantization=cfg.attention_quantization,
    )


def layout(cfg: Config, plan: AttentionPlan, devices: Devices, data: int = 1) -> Layout:
    """How a plan shares these devices; `data` stands for ici_data_parallelism=auto."""
    from maxdiffusion.request.cost import Layout

    ici, dcn = resolve(*degrees(cfg, data), devices)
    sharded = axes.RING in rules_for(cfg.logical_axis_rules)[axes.EMBED]
    context = ici.context * dcn.context
    return Layout(plan, ici.data * dcn.data, ici.fsdp * dcn.fsdp, context, sharded, dcn.context)


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
    """Degrees inside a slice and over slices; `data` stands for ici_data_parallelism=auto."""
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
