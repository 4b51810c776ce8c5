"""What the config says about devices, made at startup: the attention plan, the mesh and its table of logical axes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax

from maxdiffusion import variants
from maxdiffusion.attention import api
from maxdiffusion.attention.options import KernelOptions
from maxdiffusion.attention.plan import AttentionPlan, plans
from maxdiffusion.config import Config, parts
from maxdiffusion.config.examples import examples
from maxdiffusion.errors import UserError
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.parallel import axes
from maxdiffusion.parallel.mesh import Degrees, Devices, make_mesh, resolve
from maxdiffusion.parallel.placement import Placement
from maxdiffusion.parallel.rules import rules_for
from maxdiffusion.request import cost

log = logging.getLogger(__name__)


def lay_out(
    cfg: Config, configs: Mapping[str, Any], devices: Devices | None = None
) -> tuple[AttentionPlan, Placement, tuple[int, int, int, int]]:
    """`place` for the nets' configs (by folder), and f h w c of one video's latents.

    Raises:
      UserError: as `place`, or a size is not one of the transformer's.
    """
    cut = parts.of(cfg)
    f, h, w = variants.get(cfg.model_name).latent_grid(cut.length, cfg.height, cfg.width)
    plan, placement = place(cfg, configs, devices)
    return plan, placement, (cut.latent_frames(f), h, w, configs["vae"].z_dim)


def most_tokens(cfg: Config, network: DiTConfig) -> int:
    """Of what is denoised at once of the largest video.

    Raises:
      UserError: a size is not one of the transformer's.
    """
    spec, cut = variants.get(cfg.model_name), parts.of(cfg)
    grids = {spec.latent_grid(cut.length, video.height, video.width) for video in examples(cfg)}
    return max(math.prod(network.grid(cut.leading + f, h, w)) for f, h, w in grids)


def place(cfg: Config, configs: Mapping[str, Any], devices: Devices | None = None) -> tuple[AttentionPlan, Placement]:
    """The plan and the placement of every later array, on these devices (all by default).

    What the config leaves open is chosen by `request.cost`: the split of the context axis, and whether the guidance
    pair takes two devices of the data axis. A degree that the config gives stays.

    Args:
      cfg: the run.
      configs: of its nets, by folder.
      devices: where to run.

    Raises:
      UserError: the degrees do not fit the devices, the heads or each other.
    """
    devices = jax.devices() if devices is None else devices
    run = cost.Run.of(cfg, configs, cost.experts_of(cfg), devices[0].device_kind, devices[0].platform)
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
      UserError: the degrees do not fit the devices, or the kernel is not to be had.
    """
    ici, dcn = resolve(*degrees(cfg, data), devices)
    context = ici.context * dcn.context
    legal, illegal = plans(
        cfg.attention,
        heads=run.width // run.head_dim,
        context=context,
        slices=dcn.context,
        ulysses_shards=cfg.ulysses_shards,
        platform=run.platform,
        dtype=cfg.activations_dtype,
        tensor=ici.tensor * dcn.tensor,
        options=KernelOptions.read(cfg),
        chunks=cfg.ulysses_attention_chunks,
        ring_direction=cfg.ring_direction,
    )
    sharded = axes.RING in (rules_for(cfg.logical_axis_rules)[axes.EMBED] or ())
    shared = (ici.data * dcn.data, ici.fsdp * dcn.fsdp, context, sharded, dcn.context)
    return {ulysses: cost.Layout(plan, *shared) for ulysses, plan in legal.items()}, illegal


def _pair_may_split(cfg: Config) -> bool:
    """Whether it is open if the two branches of guidance run on two devices of the data axis or in one batch."""
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
