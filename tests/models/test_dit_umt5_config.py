"""What the configs of the transformer and the text encoder refuse, and that reading them needs no jax."""

import subprocess
import sys

import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.models.dit.config import DiTConfig
from maxdiffusion.models.umt5.config import UMT5Config

# As in the official 1.3B checkpoint.
TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0.dev0",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
TEXT_ENCODER = {
    "architectures": ["UMT5EncoderModel"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "model_type": "umt5",
    "num_heads": 64,
    "num_layers": 24,
    "scalable_attention": True,
    "vocab_size": 256384,
}


def test_the_official_files_are_understood():
    transformer = DiTConfig.from_json(TRANSFORMER)
    assert (transformer.dim, transformer.patch_size) == (1536, (1, 2, 2))
    assert DiTConfig.from_json({**TRANSFORMER, "out_channels": None}).out_channels == 16
    assert UMT5Config.from_json(TEXT_ENCODER).layer_norm_epsilon == 1e-6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vace_layers": [0, 5]}, "keys that are not supported: vace_layers"),
        ({"image_dim": 1280}, "image_dim=1280 it must be 1536"),
        ({"qk_norm": None}, "qk_norm=None"),
        ({"cross_attn_norm": False}, "cross_attn_norm=False"),
        ({"_class_name": "WanVACETransformer3DModel"}, "has no 'vace_layers'"),
        ({"_class_name": "WanSpeechTransformer3DModel"}, "_class_name"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_layers": True}, "num_layers=True"),
        ({"num_layers": "30"}, "num_layers='30'"),
        ({"patch_size": [2, 2]}, "patch_size"),
        ({"attention_head_dim": 10}, "attention_head_dim is 10"),
        ({"attention_head_dim": 13}, "attention_head_dim is 13"),
    ],
)
def test_what_the_transformer_refuses(change, message):
    with pytest.raises(UserError, match=message):
        DiTConfig.from_json({**TRANSFORMER, **change})


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="has no 'ffn_dim'"):
        DiTConfig.from_json({key: value for key, value in TRANSFORMER.items() if key != "ffn_dim"})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'"),
        ({"model_type": "t5"}, "model_type='t5'"),
        ({"d_kv": 1.5}, "d_kv=1.5"),
        ({"relative_attention_num_buckets": 30}, "30 relative position buckets"),
    ],
)
def test_what_the_text_encoder_refuses(change, message):
    with pytest.raises(UserError, match=message):
        UMT5Config.from_json({**TEXT_ENCODER, **change})


def test_grid():
    config = DiTConfig.from_json(TRANSFORMER)
    assert config.grid(21, 60, 104) == (21, 30, 52)
    with pytest.raises(UserError, match=r"width 105 does not divide.*104 and 106"):
        config.grid(21, 60, 105)
    with pytest.raises(UserError, match=r"1025 positions.*at most 1024"):
        config.grid(1025, 2, 2)


def test_configs_are_read_without_jax():
    program = (
        "import sys, maxdiffusion.models.dit.config, maxdiffusion.models.umt5.config\n"
        "sys.exit(bool({'jax', 'flax', 'numpy', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
