"""The LoRA files that a config names: located, and merged into the transformers of its checkpoint. Imports no jax."""

from __future__ import annotations

import dataclasses
import logging
import os

from maxdiffusion.errors import UserError
from maxdiffusion.hardware.quantization import LARGEST
from maxdiffusion.media import fetch as urls
from maxdiffusion.request.job import Job
from maxdiffusion.request.nets import open_checkpoint
from maxdiffusion.runtime import paths
from maxdiffusion.runtime.paths import AnyPath, probe
from maxdiffusion.weights import hub
from maxdiffusion.weights.checkpoint import Checkpoint
from maxdiffusion.weights.lora.file import ADAPTER_CONFIG, read
from maxdiffusion.weights.lora.merge import Merge, merge

logger = logging.getLogger(__name__)

NETS = {"lora": "transformer", "lora_2": "transformer_2"}
_BYTES = 32 * 2**30  # of a file from a URL, at most


def merged(job: Job, checkpoint: Checkpoint, fetch: bool = True) -> Checkpoint:
    """The checkpoint with the updates of the run's LoRAs, from headers alone; a file elsewhere is fetched if it may be.

    Raises:
      UserError: a file cannot be had, is damaged, or does not fit its transformer; nothing is loaded.
    """
    nets = dict(checkpoint.nets)
    for key, name in NETS.items():
        for location, strength in getattr(job.cfg, key).items():
            net, path = nets[name], locate(location, key, fetch)
            try:
                lora = dataclasses.replace(read(path, net.config.adapter_layers), name=location)
                tensors, own = merge(net.tensors, net.config, lora, strength)
            except UserError as error:
                raise UserError(str(error).replace(str(path), location)) from None
            nets[name] = dataclasses.replace(net, tensors=tensors, loras=(*net.loras, own))
    return dataclasses.replace(checkpoint, nets=nets)


def check_local(job: Job) -> None:
    """Checks the LoRAs against a checkpoint that is a local folder; those on the hub or at a URL are left out.

    Raises:
      UserError: as `merged`.
    """
    cfg = job.cfg
    keys = {
        key: {
            location: strength
            for location, strength in getattr(cfg, key).items()
            if not paths.is_url(location) and (not hub.names_file(location) or probe(location).exists())
        }
        for key in NETS
    }
    if any(keys.values()) and probe(os.path.expanduser(cfg.pretrained_model_name_or_path)).is_dir():
        job = dataclasses.replace(job, cfg=cfg.model_copy(update=keys))
        merged(job, open_checkpoint(job, fetch=False), fetch=False)


def locate(location: str, key: str, fetch: bool = True) -> AnyPath:
    """The file at a path, a URL or `owner/repo/file.safetensors` on the hub; a path that exists wins.

    Raises:
      UserError: there is none, or it may not be fetched.
    """
    if paths.is_url(location):
        if not fetch:
            raise UserError(f"{key}={location} is not fetched to be inspected; download it and give its path.")
        return urls.local(location, _BYTES)
    path = probe(location)
    if path.exists():
        return path
    if (cached := hub.file(location, [ADAPTER_CONFIG], fetch)) is not None:
        return cached
    raise UserError(
        f"{key}={location} does not exist; give the path or URL of a .safetensors file, or owner/repo/file.safetensors "
        "on the hub."
    )


def report(checkpoint: Checkpoint, dtype: str) -> None:
    """Logs what matched of each LoRA, after reading every file once; the weights are rounded to `dtype`.

    Raises:
      UserError: a number is NaN or infinite.
    """
    for name, net in checkpoint.nets.items():
        for each in net.loras:
            _report(name, each, dtype)


def _report(name: str, each: Merge, dtype: str) -> None:
    logger.info("LoRA of the %s: %s (sha256 %.12s)", name, each, each.lora.digest)
    if (lost := each.lost(dtype)) > 0.5:
        logger.warning(
            "rounding the %s to %s removes %.0f %% of the update of %s; a larger strength or %s keeps more",
            name,
            dtype,
            100 * min(lost, 1),
            each.lora.name,
            "quantization=none" if dtype in LARGEST else "weights_dtype=float32",
        )
