"""Names of the WAN 2.1 and 2.2 VAE, diffusers' AutoencoderKLWan.

Convolutions of size 1 are plain matrices here, so their kernels are reshaped.
"""

from __future__ import annotations

import dataclasses

from maxdiffusion.weights.rule import Rule, Rules, Transform, weight_bias


def _norm(path: str) -> Rule:
    return Rule(f"{path}.gamma", f"{path}.scale", reshape=True)


def _residual(path: str) -> Rules:
    return (
        _norm(f"{path}.norm1"),
        *weight_bias(f"{path}.conv1", f"{path}.conv1", Transform.CONV3D),
        _norm(f"{path}.norm2"),
        *weight_bias(f"{path}.conv2", f"{path}.conv2", Transform.CONV3D),
        *weight_bias(f"{path}.conv_shortcut", f"{path}.conv_shortcut", Transform.CONV3D, reshape=True),
    )


def _resample(path: str, alias: str | None = None) -> Rules:
    """`alias` is the path in the other version of the network."""
    rules = (
        *weight_bias(f"{path}.resample.1", f"{path}.resample", Transform.CONV2D),
        *weight_bias(f"{path}.time_conv", f"{path}.time_conv", Transform.CONV3D),
    )
    if alias is None:
        return rules
    return tuple(dataclasses.replace(rule, aliases=(rule.source.replace(path, alias),)) for rule in rules)


def _coder(path: str) -> Rules:
    """The part that encoder and decoder share."""
    attention = f"{path}.mid_block.attentions.{{i}}"
    return (
        *weight_bias(f"{path}.conv_in", f"{path}.conv_in", Transform.CONV3D),
        *_residual(f"{path}.mid_block.resnets.{{i}}"),
        _norm(f"{attention}.norm"),
        *weight_bias(f"{attention}.to_qkv", f"{attention}.to_qkv", Transform.CONV2D, reshape=True),
        *weight_bias(f"{attention}.proj", f"{attention}.proj", Transform.CONV2D, reshape=True),
        _norm(f"{path}.norm_out"),
        *weight_bias(f"{path}.conv_out", f"{path}.conv_out", Transform.CONV3D),
    )


RULES: Rules = (
    *_coder("encoder"),
    *_residual("encoder.down_blocks.{i}"),
    *_resample("encoder.down_blocks.{i}"),
    *_residual("encoder.down_blocks.{i}.resnets.{j}"),
    *_resample("encoder.down_blocks.{i}.downsampler"),
    *weight_bias("quant_conv", "quant_conv", Transform.CONV3D, reshape=True),
    *weight_bias("post_quant_conv", "post_quant_conv", Transform.CONV3D, reshape=True),
    *_coder("decoder"),
    *_residual("decoder.up_blocks.{i}.resnets.{j}"),
    *_resample("decoder.up_blocks.{i}.upsamplers.0", "decoder.up_blocks.{i}.upsampler"),
)
