"""Names of `transformers.UMT5EncoderModel`."""

from maxdiffusion.weights.rule import Rule, Transform

_ATTENTION = "encoder.block.{layer}.layer.0"
_FEED_FORWARD = "encoder.block.{layer}.layer.1"

RULES: tuple[Rule, ...] = (
    Rule("shared.weight", "shared.embedding", aliases=("encoder.embed_tokens.weight",)),
    *(
        Rule(f"{_ATTENTION}.SelfAttention.{name}.weight", f"block.attention.{name}.kernel", Transform.LINEAR)
        for name in ("q", "k", "v", "o")
    ),
    Rule(
        f"{_ATTENTION}.SelfAttention.relative_attention_bias.weight",
        "block.attention.relative_attention_bias.embedding",
    ),
    Rule(f"{_ATTENTION}.layer_norm.weight", "block.attention_norm.scale"),
    *(
        Rule(f"{_FEED_FORWARD}.DenseReluDense.{name}.weight", f"block.feed_forward.{name}.kernel", Transform.LINEAR)
        for name in ("wi_0", "wi_1", "wo")
    ),
    Rule(f"{_FEED_FORWARD}.layer_norm.weight", "block.feed_forward_norm.scale"),
    Rule("encoder.final_layer_norm.weight", "final_layer_norm.scale"),
)
