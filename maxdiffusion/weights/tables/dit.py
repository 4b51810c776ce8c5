"""Names of `diffusers.WanTransformer3DModel`."""

from maxdiffusion.weights.rule import Rule, Transform

_LINEARS = {
    "condition_embedder.time_embedder.linear_1": "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2": "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj": "condition_embedder.time_proj",
    "condition_embedder.text_embedder.linear_1": "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2": "condition_embedder.text_embedder.linear_2",
    "condition_embedder.image_embedder.ff.net.0.proj": "condition_embedder.image_embedder.ff.linear_1",
    "condition_embedder.image_embedder.ff.net.2": "condition_embedder.image_embedder.ff.linear_2",
    "blocks.{layer}.attn1.to_q": "blocks.attn1.to_q",
    "blocks.{layer}.attn1.to_k": "blocks.attn1.to_k",
    "blocks.{layer}.attn1.to_v": "blocks.attn1.to_v",
    "blocks.{layer}.attn1.to_out.0": "blocks.attn1.to_out",
    "blocks.{layer}.attn2.to_q": "blocks.attn2.to_q",
    "blocks.{layer}.attn2.to_k": "blocks.attn2.to_k",
    "blocks.{layer}.attn2.to_v": "blocks.attn2.to_v",
    "blocks.{layer}.attn2.to_out.0": "blocks.attn2.to_out",
    "blocks.{layer}.attn2.add_k_proj": "blocks.attn2_image.0.to_k",
    "blocks.{layer}.attn2.add_v_proj": "blocks.attn2_image.0.to_v",
    "blocks.{layer}.ffn.net.0.proj": "blocks.ffn.linear_1",
    "blocks.{layer}.ffn.net.2": "blocks.ffn.linear_2",
    "proj_out": "proj_out",
}

RULES: tuple[Rule, ...] = (
    # The kernel acts on folded patches (t, h, w, c), so the convolution's four input axes become one.
    Rule("patch_embedding.weight", "patch_embedding.kernel", Transform.CONV3D, reshape=True),
    Rule("patch_embedding.bias", "patch_embedding.bias"),
    *(Rule(f"{source}.weight", f"{target}.kernel", Transform.LINEAR) for source, target in _LINEARS.items()),
    *(Rule(f"{source}.bias", f"{target}.bias") for source, target in _LINEARS.items()),
    *(
        Rule(f"blocks.{{layer}}.{attention}.{norm}.weight", f"blocks.{attention}.{norm}.scale")
        for attention in ("attn1", "attn2")
        for norm in ("norm_q", "norm_k")
    ),
    Rule("blocks.{layer}.attn2.norm_added_k.weight", "blocks.attn2_image.0.norm_k.scale"),
    *(
        Rule(f"condition_embedder.image_embedder.{norm}.{source}", f"condition_embedder.image_embedder.{norm}.{target}")
        for norm in ("norm1", "norm2")
        for source, target in (("weight", "scale"), ("bias", "bias"))
    ),
    Rule("condition_embedder.image_embedder.pos_embed", "condition_embedder.image_embedder.pos_embed", reshape=True),
    Rule("blocks.{layer}.norm2.weight", "blocks.norm2.scale"),
    Rule("blocks.{layer}.norm2.bias", "blocks.norm2.bias"),
    Rule("blocks.{layer}.scale_shift_table", "blocks.scale_shift_table", reshape=True),
    Rule("scale_shift_table", "scale_shift_table", reshape=True),
)
