"""The start image as the official pipelines encode it, without their networks."""

import types

import numpy as np
import torch
from PIL import Image

from tests.support import official

TASKS = {"i2v": ("image2video", "WanI2V", (4, 8, 8)), "ti2v": ("textimage2video", "WanTI2V", (4, 16, 16))}


class Encoding(Exception):
    """Ends a run where it encodes the start image."""


def encoded(task: str, image: Image.Image, area: int) -> np.ndarray:
    """The frame that `WanI2V.generate` or `WanTI2V.generate` gives to its VAE, h w c."""

    def encode(videos):
        raise Encoding(videos[0])

    module, name, stride = TASKS[task]
    pipe = object.__new__(getattr(official.load(module), name))
    pipe.__dict__.update(vae_stride=stride, patch_size=(1, 2, 2), sp_size=1, device="cpu", t5_cpu=True)
    pipe.__dict__.update(text_encoder=lambda texts, device: [torch.zeros(1)], sample_neg_prompt="")
    pipe.vae = types.SimpleNamespace(encode=encode, model=types.SimpleNamespace(z_dim=48))
    try:
        pipe.generate("", image, max_area=area, frame_num=1, seed=0)
    except Encoding as reached:
        return official.channels_last(reached.args[0])[0]
    raise AssertionError("no image was encoded")
