"""A folder in which configs can be tried: small YAML files and a checkpoint's config.json."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

DIMS = {
    "wan2.1-t2v-1.3b": (30, 12, 128, 16),
    "wan2.1-t2v-14b": (40, 40, 128, 16),
    "wan-tiny-t2v": (6, 8, 16, 8),
    "wan-tiny-i2v": (6, 8, 16, 20),
    "other": (2, 2, 12, 16),
}


def transformer_config(dims: str, **changes: object) -> dict[str, object]:
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels")
    content: dict[str, object] = dict(zip(names, DIMS[dims], strict=True)) | {"_class_name": "WanTransformer3DModel"}
    return content | {"out_channels": content["in_channels"]} | changes


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of the given name and dims with transformer/config.json."""

    def write(name: str, dims: str, **changes: object) -> Path:
        folder = tmp_path / name
        (folder / "transformer").mkdir(parents=True)
        (folder / "transformer" / "config.json").write_text(json.dumps(transformer_config(dims, **changes)))
        return folder

    return write


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test, with base.yml in it; the home folder does not depend on the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no hub is asked
    (tmp_path / "base.yml").write_text("model_name: wan2.1-t2v-1.3b\nprompt: a cat\n")
    return tmp_path
