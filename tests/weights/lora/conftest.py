"""Tiny random transformers, and what two LoRAs make of them: here and in diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from maxdiffusion.weights.checkpoint import NetFiles
from maxdiffusion.weights.lora.file import read
from maxdiffusion.weights.lora.merge import merge
from tests.support.lora import numbers, opened

SIZE = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 32, "text_dim": 16}
SIZE |= {"freq_dim": 32, "in_channels": 4, "out_channels": 4}
IMAGE = {"image_dim": 20, "added_kv_proj_dim": 24}


def folder(path: Path, **more: int) -> Path:
    torch.manual_seed(0)
    WanTransformer3DModel(**SIZE, **more).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def with_image(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("image"), **IMAGE)


@pytest.fixture
def merged() -> Callable[..., dict[str, np.ndarray]]:
    """Merges files, with their strengths, into the transformer of a folder."""

    def make(path: Path, files: Mapping[Path, float]) -> dict[str, np.ndarray]:
        net = opened(path)
        tensors = net.tensors
        for file, strength in files.items():
            tensors, _ = merge(tensors, net.config, read(file), strength)
        return numbers(NetFiles(path, net.config, tensors))

    return make


@pytest.fixture
def fused() -> Callable[..., dict[str, np.ndarray]]:
    """The weights after diffusers has loaded and fused files with their strengths."""

    def make(path: Path, files: Mapping[Path, float]) -> dict[str, np.ndarray]:
        net = WanTransformer3DModel.from_pretrained(path)
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=net)
        for i, file in enumerate(files):
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"n{i}")
        pipe.set_adapters([f"n{i}" for i in range(len(files))], list(files.values()))
        pipe.fuse_lora(adapter_names=[f"n{i}" for i in range(len(files))])
        state = net.state_dict()
        return {name.replace(".base_layer", ""): t.numpy() for name, t in state.items() if "lora" not in name}

    return make
