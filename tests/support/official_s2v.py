"""A tiny transformer of the official WAN 2.2 S2V, and its pipeline in float32 on files of this project's readers."""

from __future__ import annotations

import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from maxdiffusion.media.read import read_video
from maxdiffusion.media.samples import read_samples
from tests.support import official

HEAD_DIM, AUDIO = 24, 10
LAYERS = (0, 2)
CLIP = 12  # frames

# transformer/config.json: what follows from no shape.
CONFIG: dict[str, Any] = {"audio_inject_layers": list(LAYERS)}


def transformer() -> torch.nn.Module:
    """Random, of three layers with the sound after the first and the last."""
    kind = official.load("modules.s2v.model_s2v").WanModel_S2V
    kind.ignore_for_config = ["args", "kwargs"]  # so that `text_dim` is stored
    net = kind(
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


def write_checkpoint(folder: Path) -> Path:
    """See `official.write_checkpoint`."""
    return official.write_checkpoint(folder, "wan2.2-s2v", transformers={"transformer": transformer()}, config=CONFIG)


def words(checkpoint: Path, folder: Path, clip: int = CLIP) -> list[str]:
    """A run of that checkpoint in fp32, without its inputs; writes its page into `folder`."""
    (folder / "s2v.yml").write_text("model_name: wan2.2-s2v\nprompt: a cat sings\n")
    return [str(folder / "s2v.yml"), *official.words(checkpoint), f"segment_frame_length={clip}", *official.FP32]


def pipeline(checkpoint: Path) -> Any:
    """The official `WanS2V` over a checkpoint of `official.write_checkpoint` with `transformer` and `CONFIG`."""
    module, audio = official.load("speech2video"), official.load("modules.s2v.audio_encoder")
    module.VideoReader = _Reader
    module.transforms = types.SimpleNamespace(Resize=_Resize, CenterCrop=_CenterCrop, ToTensor=_ToTensor)
    audio.librosa = types.SimpleNamespace(load=lambda path, sr: (read_samples(str(path), sr).values, sr))
    audio.Wav2Vec2Processor = types.SimpleNamespace(  # without its tokenizer, of letters
        from_pretrained=lambda _: transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    )
    return official.pipeline(checkpoint, "s2v-14B")


class _Reader:
    """As much of `decord.VideoReader` as the official code uses."""

    def __init__(self, path: str):
        self._frames = read_video(path)

    def __len__(self) -> int:
        return len(self._frames)

    def get_avg_fps(self) -> float:
        return float(Fraction(16))

    def get_batch(self, indices: list[int]) -> Any:
        frames: np.ndarray = self._frames[indices]
        return types.SimpleNamespace(asnumpy=lambda: frames)


class _Resize:
    """torchvision's, of the short side, for pictures; frames have their size already."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Any) -> Any:
        if isinstance(image, torch.Tensor):
            assert min(image.shape[-2:]) == self.size
            return image
        w, h = (int(self.size * side / min(image.size)) for side in image.size)
        return image.resize((w, h), Image.Resampling.BILINEAR)


class _CenterCrop:
    """torchvision's, height and width, for pictures that are large enough."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, image: Any) -> Any:
        height, width = self.size
        if isinstance(image, torch.Tensor):
            assert image.shape[-2:] == (height, width)
            return image
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        assert min(left, top) >= 0
        return image.crop((left, top, left + width, top + height))


def _ToTensor() -> Any:
    return lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
