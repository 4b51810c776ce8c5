"""The vision tower and its preprocessing against transformers'."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image

from maxdiffusion.errors import UserError
from maxdiffusion.models.clip.config import CLIPVisionConfig
from maxdiffusion.models.clip.vision import CLIPVision, preprocess
from maxdiffusion.models.layers import Dtypes
from maxdiffusion.weights.tables import clip as table
from tests.support.parity import load_state_dict, relative_error

TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "gelu",
}


def tower(raw, dtype=jnp.float32, **kwargs):
    return CLIPVision(CLIPVisionConfig.from_json(raw), Dtypes(dtype, dtype), **kwargs)


def kept(state_dict):
    return {k: v for k, v in state_dict.items() if not any(re.fullmatch(p, k) for p in table.IGNORED)}


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_hidden_states_match_the_reference(prefix, scan_layers):
    torch.manual_seed(0)
    reference = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pixels = np.random.default_rng(0).standard_normal((2, 28, 28, 3), np.float32)
    with torch.no_grad():
        theirs = reference(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[-2]
    state_dict = {prefix + name: tensor for name, tensor in kept(reference.state_dict()).items()}
    ours = load_state_dict(tower(TINY, scan_layers=scan_layers), table.RULES, state_dict)
    hidden = nnx.jit(lambda model, x: model(x))(ours, jnp.asarray(pixels))
    assert hidden.shape == (2, 5, 48) and hidden.dtype == jnp.float32
    assert relative_error(hidden, theirs.numpy()) < 1e-5


@pytest.mark.parametrize("size", [(64, 64), (97, 41), (31, 200), (20, 24)])
def test_preprocessing_equals_the_reference(size):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    theirs = processor(images=[image], return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(preprocess([np.asarray(image)], 28, "centre"), theirs, atol=1e-6)


def test_a_tower_of_another_kind_is_refused():
    with pytest.raises(UserError, match="hidden_act='quick_gelu'"):
        CLIPVisionConfig.from_json(TINY | {"hidden_act": "quick_gelu"})
