"""A tiny transformer of the official WAN 2.2 Animate, and its pipeline in float32 on files of this project's reader."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maxdiffusion.media.read import read_video
from tests.support import official

CHANNELS = 4  # of the motion encoder, whose faces of 512 pixels are fixed by the official names of its layers

# transformer/config.json: what follows from no shape.
CONFIG: dict[str, Any] = {
    "motion_encoder_channel_sizes": {str(2**n): CHANNELS for n in range(2, 10)},
    "motion_style_dim": 16,
    "motion_dim": 5,
    "motion_encoder_dim": 14,
}


def transformer() -> torch.nn.Module:
    """Random, of ten layers with two face adapters."""
    torch.manual_seed(0)
    _patch()
    module = official.load("modules.animate.model_animate")
    net = official.randomize(
        module.WanAnimateModel(**official.TRANSFORMER | {"num_layers": 10, "motion_encoder_dim": 14})
    )
    net.motion_encoder = (
        module.Generator()
    )  # whose layers scale their weights themselves, so that they are drawn as such
    return net.eval()


def pipeline(checkpoint: Path) -> Any:
    """The official `WanAnimate` over a checkpoint of `official.write_checkpoint` with `transformer` and `CONFIG`."""
    _patch()
    module = official.load("animate")
    module.torch.bfloat16 = module.torch.float16 = torch.float32
    module.VideoReader = _Reader
    return official.pipeline(checkpoint, "animate-14B")


def _patch() -> None:
    """Gives the module a small motion encoder, and attention without flash-attn."""
    official.load("modules.animate.face_blocks").flash_attn_func = official.attention
    official.load("modules.animate.model_animate").Generator = _motion_encoder


def _motion_encoder(**_: Any) -> torch.nn.Module:
    """The official `Generator` with few channels, built of its own layers."""
    module = official.load("modules.animate.motion_encoder")
    net = module.Generator(512, CONFIG["motion_style_dim"], CONFIG["motion_dim"])
    last = module.EqualConv2d(CHANNELS, CONFIG["motion_style_dim"], 4, padding=0, bias=False)
    blocks = [module.ResBlock(CHANNELS, CHANNELS) for _ in range(7)]
    net.enc.net_app.convs = torch.nn.ModuleList([module.ConvLayer(3, CHANNELS, 1), *blocks, last])
    net.dec.direction.weight = torch.nn.Parameter(torch.randn(CONFIG["motion_encoder_dim"], CONFIG["motion_dim"]))
    return net


class _Reader:
    """As much of `decord.VideoReader` as the official code uses."""

    def __init__(self, path: str):
        self._frames = read_video(path)

    def __len__(self) -> int:
        return len(self._frames)

    def get_batch(self, indices: list[int]) -> Any:
        frames: np.ndarray = self._frames[indices]
        return types.SimpleNamespace(asnumpy=lambda: frames)
