"""Names of `transformers.CLIPVisionModel`; files of transformers 4 prefix them with `vision_model.`."""

import dataclasses

from maxdiffusion.weights.rule import Rule, Transform

_LAYER = "encoder.layers.{layer}"
_LINEARS = {f"self_attn.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
_LINEARS |= {"mlp.fc1": "mlp.linear_1", "mlp.fc2": "mlp.linear_2"}

_RULES = (
    Rule("embeddings.class_embedding", "class_embedding", reshape=True),
    Rule("embeddings.patch_embedding.weight", "patch_embedding.kernel", Transform.CONV2D, reshape=True),
    Rule("embeddings.position_embedding.weight", "position_embedding", reshape=True),
    Rule("pre_layrnorm.weight", "pre_norm.scale"),  # sic
    Rule("pre_layrnorm.bias", "pre_norm.bias"),
    *(
        Rule(f"{_LAYER}.{source}.weight", f"layers.{ours}.kernel", Transform.LINEAR)
        for source, ours in _LINEARS.items()
    ),
    *(Rule(f"{_LAYER}.{source}.bias", f"layers.{ours}.bias") for source, ours in _LINEARS.items()),
    *(
        Rule(f"{_LAYER}.{norm}.{source}", f"layers.{norm}.{ours}")
        for norm in ("layer_norm1", "layer_norm2")
        for source, ours in (("weight", "scale"), ("bias", "bias"))
    ),
)

RULES: tuple[Rule, ...] = tuple(dataclasses.replace(rule, aliases=(f"vision_model.{rule.source}",)) for rule in _RULES)
# The model reads the hidden states before the last layer, which no norm and no projection has seen.
IGNORED = (
    r"(vision_model\.)?post_layernorm\.(weight|bias)",
    r"(vision_model\.)?embeddings\.position_ids",
    r"visual_projection\.weight",
    r"log_scale|textual\..*",  # the rest of the whole CLIP, in files of the original naming
)
