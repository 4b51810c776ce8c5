"""Names of `transformers.Wav2Vec2Model`; files of `Wav2Vec2ForCTC` prefix them with `wav2vec2.`."""

import dataclasses

from maxdiffusion.weights.rule import Rule, Rules, Transform, norm, weight_bias

_LAYER = "encoder.layers.{layer}"
_LINEARS = {f"attention.{name}": f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
_LINEARS |= {
    "feed_forward.intermediate_dense": "feed_forward.linear_1",
    "feed_forward.output_dense": "feed_forward.linear_2",
}
_CONV, _POSITIONS = "feature_extractor.conv_layers.{i}", "encoder.pos_conv_embed.conv"
_PREFIX = "wav2vec2."

_RULES = (
    *weight_bias(f"{_CONV}.conv", "conv_layers.{i}", Transform.CONV1D),
    *norm(f"{_CONV}.layer_norm", "conv_layers.{i}.layer_norm"),
    *norm("feature_projection.layer_norm", "feature_norm"),
    *weight_bias("feature_projection.projection", "projection"),
    Rule(f"{_POSITIONS}.weight_g", "positions.gain", reshape=True),
    Rule(f"{_POSITIONS}.weight_v", "positions.direction", Transform.CONV1D),
    Rule(f"{_POSITIONS}.bias", "positions.bias"),
    *(rule for source, ours in _LINEARS.items() for rule in weight_bias(f"{_LAYER}.{source}", f"layers.{ours}")),
    *norm(f"{_LAYER}.layer_norm", "layers.layer_norm"),
    *norm(f"{_LAYER}.final_layer_norm", "layers.final_layer_norm"),
    *norm("encoder.layer_norm", "layer_norm"),
)

# Newer versions of torch call the two parts of a normalised weight original0 and original1.
_PARTS = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def _named(rule: Rule) -> Rule:
    stem, _, last = rule.source.rpartition(".")
    names = [rule.source] + ([f"{stem}.{_PARTS[last]}"] if last in _PARTS else [])
    return dataclasses.replace(rule, aliases=(*names[1:], *(_PREFIX + name for name in names)))


RULES: Rules = tuple(map(_named, _RULES))
# The masked frames of training, and the head for letters.
IGNORED = (r"(wav2vec2\.)?masked_spec_embed", r"lm_head\.(weight|bias)")
