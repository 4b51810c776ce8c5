"""The checkpoint that a config names, and how its networks are built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from maxdiffusion.config.schema import Config
from maxdiffusion.hardware import quantization
from maxdiffusion.request.job import Job
from maxdiffusion.runtime.paths import parse, probe
from maxdiffusion.weights import checkpoint, hub, official

if TYPE_CHECKING:
    from maxdiffusion.attention.plan import AttentionPlan
    from maxdiffusion.weights.nets import Build


def open_checkpoint(job: Job, fetch: bool = True) -> checkpoint.Checkpoint:
    """The checkpoint, opened; a hub id is fetched first, if it may be. Imports no jax.

    Raises:
      UserError: it cannot be fetched, is damaged, or is not of the variant that the config names.
    """
    cfg = job.cfg
    given = {
        "text_encoder": cfg.text_encoder_file,
        "image_encoder": cfg.image_encoder_file,
        "audio_encoder": cfg.audio_encoder_file,
        "transformer": cfg.transformer_file,
        "transformer_2": cfg.transformer_2_file,
        "vae": cfg.vae_file,
    }
    files = {net: parse(file) for net, file in given.items() if file}
    unneeded = [f"{net}/*.safetensors*" for net in files]
    folder = hub.resolve(cfg.pretrained_model_name_or_path, cfg.revision, ignore=unneeded, fetch=fetch)
    return checkpoint.open_checkpoint(folder, job.spec, files, job.transformer)


def read_configs(job: Job) -> Mapping[str, Any]:
    """The networks' configs by folder: the checkpoint's where it is a folder, else the official ones of the variant.

    Raises:
      UserError: the folder's files are not what the config says, or the variant has no official checkpoint.
    """
    if probe(os.path.expanduser(job.cfg.pretrained_model_name_or_path)).is_dir():
        return open_checkpoint(job, fetch=False).configs
    return official.configs(job.spec)


def builders(cfg: Config, plan: AttentionPlan, device_kind: str = "") -> dict[str, Build]:
    """How each network is built, with the config's dtypes; quantization=auto is by the kind of device."""
    from maxdiffusion.weights import nets

    return nets.builders(
        plan,
        weights_dtype=cfg.weights_dtype,
        dtype=cfg.activations_dtype,
        text_encoder_dtype=cfg.text_encoder_dtype,
        vae_dtype=cfg.vae_dtype,
        scan_layers=cfg.scan_layers,
        quantization=quantization.choose(cfg.quantization, device_kind),
    )
