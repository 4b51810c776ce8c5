"""A tiny transformer of the official WAN 2.2 S2V."""

from __future__ import annotations

from typing import Any

import torch

from tests.support import official

HEAD_DIM, AUDIO = 24, 10
LAYERS = (0, 2)

# transformer/config.json: what follows from no shape.
CONFIG: dict[str, Any] = {"audio_inject_layers": list(LAYERS)}


def transformer() -> torch.nn.Module:
    """Random, of three layers with the sound after the first and the last."""
    net = official.load("modules.s2v.model_s2v").WanModel_S2V(
        **official.TRANSFORMER | {"dim": 2 * HEAD_DIM, "num_layers": 3},
        cond_dim=16,
        audio_dim=AUDIO,
        enable_adain=True,
        audio_inject_layers=list(LAYERS),
        zero_timestep=True,
        enable_motioner=False,
        enable_framepack=True,
        framepack_drop_mode="padd",
    )
    official.randomize(net)
    with torch.no_grad():
        net.casual_audio_encoder.weights.add_(0.5)  # whose sum is divided by
    return net
