"""LoRA files in every convention, of random numbers, for any of the transformer's modules."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.weights import naming
from maxdiffusion.weights.checkpoint import NetFiles
from maxdiffusion.weights.headers import read_tensors
from maxdiffusion.weights.tables import original
from tests.support.safetensors_file import NAMES

# (name in diffusers, original name) of the linear layers of block {i}.
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
LINEARS = [
    *((f"attn1.{ours}", f"self_attn.{theirs}") for ours, theirs in _ATTENTION.items()),
    *((f"attn2.{ours}", f"cross_attn.{theirs}") for ours, theirs in _ATTENTION.items()),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
]
OTHERS = [
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
]
DTYPES = {**NAMES, np.dtype(np.int64): "I64", np.dtype(np.float64): "F64", np.dtype(np.int8): "I8"}


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file of any dtypes; an array of bytes is written as it is, in a dtype that it names."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, array in tensors.items():
        part = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        data += part
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def modules(layers: int, others: bool = True) -> list[tuple[str, str]]:
    """(diffusers name, original name) of every linear layer of a transformer."""
    blocks = [(f"blocks.{i}.{ours}", f"blocks.{i}.{theirs}") for i in range(layers) for ours, theirs in LINEARS]
    return blocks + (OTHERS if others else [])


def factors(
    shapes: Mapping[str, tuple[int, ...]], names: Sequence[str], rank: int = 4, seed: int = 0
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(down, up) of each module, in fp32; `shapes` are those of all weights by their diffusers names."""
    rng = np.random.default_rng(seed)
    result = {}
    for name in names:
        out, width = shapes[f"{name}.weight"][:2]
        result[name] = tuple(rng.normal(0, 0.1, shape).astype("float32") for shape in ((rank, width), (out, rank)))
    return result


# ---- tiny transformers


def opened(path: Path) -> NetFiles:
    config = DiTConfig.from_json(json.loads((path / "config.json").read_text()))
    return NetFiles(path, config, naming.normalised(read_tensors(path), original.DIT))


def numbers(net: NetFiles) -> dict[str, np.ndarray]:
    """Every tensor in fp32, read in two pieces."""
    result = {}
    for name, tensor in net.tensors.items():
        count = tensor.shape[0]
        pieces = [tensor.rows(*part) for part in ((0, count // 2), (count // 2, count))]
        result[name] = np.concatenate(pieces).astype("float32")
    return result


def assert_close(ours: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray], bound: float = 1e-5) -> None:
    assert ours.keys() == reference.keys()
    for name, array in reference.items():
        error = np.abs(ours[name] - array).max()
        assert error <= bound * np.abs(array).max(), (name, error)
