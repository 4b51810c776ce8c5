"""The same video on every mesh of eight virtual devices."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.support.videos import made, psnr

RING = ("attention=ulysses_ring",)
SPLITS = {
    "R1 U8": (*RING, "ulysses_shards=8"),
    "R2 U4": (*RING, "ulysses_shards=4"),
    "R4 U2": (*RING, "ulysses_shards=2"),
    "R8 U1": (*RING, "ulysses_shards=1"),
    "guidance pair over data 2, R2 U2": (*RING, "ulysses_shards=2", "ici_data_parallelism=2", "guidance_mode=batched"),
    "chosen by cost": (),
    "R4 U2 in chunks, both ways": (*RING, "ulysses_shards=2", "ulysses_attention_chunks=2", "ring_direction=two_way"),
    "tensor 2": (*RING, "ulysses_shards=2", "ici_tensor_parallelism=2"),
    "fsdp 2": (*RING, "ulysses_shards=2", "ici_fsdp_parallelism=2"),
}


def video(folder: Path, *words: str) -> np.ndarray:
    (one,) = made(folder, "num_inference_steps=4", *words)
    return one


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> np.ndarray:
    """As far as the numbers go: every device does the whole of it, attention densely."""
    words = ("attention=dot_product", "ici_data_parallelism=-1", "ici_context_parallelism=1")
    return video(tmp_path_factory.mktemp("one"), *words)


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_the_same_video(one_device, tmp_path, split):
    assert len(jax.devices()) == 8
    figure = psnr(video(tmp_path, *SPLITS[split]), one_device)
    print(f"{split}: {figure:.1f} dB")
    assert figure > 60
