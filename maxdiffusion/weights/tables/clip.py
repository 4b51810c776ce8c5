"""Names of `transformers.CLIPVisionModel`; files of transformers 4 prefix them with `vision_model.`."""

import dataclasses

from maxdiffusion.weights.rule import Rule, Rules, Transform, norm, weight_bias

_LAYER = "encoder.layers.{layer}"
_LINEARS = {f"self_attn.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
_LINEARS |= {"mlp.fc1": "mlp.linear_1", "mlp.fc2": "mlp.linear_2"}

_RULES = (
    Rule("embeddings.class_embedding", "class_embedding", reshape=True),
    Rule("embeddings.patch_embedding.weight", "patch_embedding.kernel", Transform.CONV2D, reshape=True),
    Rule("embeddings.position_embedding.weight", "position_embedding", reshape=True),
    *norm("pre_layrnorm", "pre_norm"),  # sic
    *(rule for source, ours in _LINEARS.items() for rule in weight_bias(f"{_LAYER}.{source}", f"layers.{ours}")),
    *norm(f"{_LAYER}.layer_norm1", "layers.layer_norm1"),
    *norm(f"{_LAYER}.layer_norm2", "layers.layer_norm2"),
)

RULES: Rules = tuple(dataclasses.replace(rule, aliases=(f"vision_model.{rule.source}",)) for rule in _RULES)
# The model returns the hidden states before the last layer, to which no norm and no projection is applied.
IGNORED = (
    r"(vision_model\.)?post_layernorm\.(weight|bias)",
    r"(vision_model\.)?embeddings\.position_ids",
    r"visual_projection\.weight",
    r"log_scale|textual\..*",  # the rest of the whole CLIP, in files of the original naming
)
