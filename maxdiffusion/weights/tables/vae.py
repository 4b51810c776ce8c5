"""Names of the WAN 2.1 and 2.2 VAE (diffusers' AutoencoderKLWan) and ours."""

from __future__ import annotations

import dataclasses

from maxdiffusion.weights.rule import Rule, Transform


def _conv(source: str, target: str, transform: Transform, flat: bool = False) -> tuple[Rule, ...]:
    """A convolution; `flat`: of size 1, a plain matrix with us."""
    return (
        Rule(f"{source}.weight", f"{target}.kernel", transform, reshape=flat),
        Rule(f"{source}.bias", f"{target}.bias"),
    )


def _norm(path: str) -> Rule:
    return Rule(f"{path}.gamma", f"{path}.scale", reshape=True)


def _residual(path: str) -> tuple[Rule, ...]:
    return (
        _norm(f"{path}.norm1"),
        *_conv(f"{path}.conv1", f"{path}.conv1", Transform.CONV3D),
        _norm(f"{path}.norm2"),
        *_conv(f"{path}.conv2", f"{path}.conv2", Transform.CONV3D),
        *_conv(f"{path}.conv_shortcut", f"{path}.conv_shortcut", Transform.CONV3D, flat=True),
    )


def _resample(path: str, alias: str | None = None) -> tuple[Rule, ...]:
    """`alias`: what the path is called in another version of the net."""
    rules = (
        *_conv(f"{path}.resample.1", f"{path}.resample", Transform.CONV2D),
        *_conv(f"{path}.time_conv", f"{path}.time_conv", Transform.CONV3D),
    )
    if alias is None:
        return rules
    return tuple(dataclasses.replace(rule, aliases=(rule.source.replace(path, alias),)) for rule in rules)


def _coder(path: str) -> tuple[Rule, ...]:
    """What encoder and decoder share."""
    attention = f"{path}.mid_block.attentions.{{i}}"
    return (
        *_conv(f"{path}.conv_in", f"{path}.conv_in", Transform.CONV3D),
        *_residual(f"{path}.mid_block.resnets.{{i}}"),
        _norm(f"{attention}.norm"),
        *_conv(f"{attention}.to_qkv", f"{attention}.to_qkv", Transform.CONV2D, flat=True),
        *_conv(f"{attention}.proj", f"{attention}.proj", Transform.CONV2D, flat=True),
        _norm(f"{path}.norm_out"),
        *_conv(f"{path}.conv_out", f"{path}.conv_out", Transform.CONV3D),
    )


RULES: tuple[Rule, ...] = (
    *_coder("encoder"),
    *_residual("encoder.down_blocks.{i}"),
    *_resample("encoder.down_blocks.{i}"),
    *_residual("encoder.down_blocks.{i}.resnets.{j}"),
    *_resample("encoder.down_blocks.{i}.downsampler"),
    *_conv("quant_conv", "quant_conv", Transform.CONV3D, flat=True),
    *_conv("post_quant_conv", "post_quant_conv", Transform.CONV3D, flat=True),
    *_coder("decoder"),
    *_residual("decoder.up_blocks.{i}.resnets.{j}"),
    *_resample("decoder.up_blocks.{i}.upsamplers.0", "decoder.up_blocks.{i}.upsampler"),
)
