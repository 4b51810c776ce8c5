"""Names of `diffusers.WanTransformer3DModel` and of its relatives for VACE and Animate.

Those of S2V, which diffusers lacks, are the official ones.
"""

from maxdiffusion.weights.rule import Rule, Rules, Transform, norm, weight_bias


def _linears(source: str, target: str, *names: str) -> Rules:
    """Linear layers with the same name in both."""
    return tuple(rule for name in names for rule in weight_bias(f"{source}.{name}", f"{target}.{name}"))


def _patch(source: str, target: str) -> Rules:
    """The kernel acts on folded patches (t, h, w, c), so the convolution's four input axes become one."""
    return weight_bias(source, target, Transform.CONV3D, reshape=True)


def _attention(source: str, target: str) -> Rules:
    return (
        *_linears(source, target, "to_q", "to_k", "to_v"),
        *weight_bias(f"{source}.to_out.0", f"{target}.to_out"),
        Rule(f"{source}.norm_q.weight", f"{target}.norm_q.scale"),
        Rule(f"{source}.norm_k.weight", f"{target}.norm_k.scale"),
    )


def _block(source: str, target: str) -> Rules:
    return (
        *_attention(f"{source}.attn1", f"{target}.attn1"),
        *_attention(f"{source}.attn2", f"{target}.attn2"),
        *weight_bias(f"{source}.attn2.add_k_proj", f"{target}.attn2_image.0.to_k"),
        *weight_bias(f"{source}.attn2.add_v_proj", f"{target}.attn2_image.0.to_v"),
        Rule(f"{source}.attn2.norm_added_k.weight", f"{target}.attn2_image.0.norm_k.scale"),
        *weight_bias(f"{source}.ffn.net.0.proj", f"{target}.ffn.linear_1"),
        *weight_bias(f"{source}.ffn.net.2", f"{target}.ffn.linear_2"),
        *norm(f"{source}.norm2", f"{target}.norm2"),
        Rule(f"{source}.scale_shift_table", f"{target}.scale_shift_table", reshape=True),
    )


def _motion_encoder(source: str, target: str) -> Rules:
    convolutions = ("conv_in", "conv_out", *(f"res_blocks.{{i}}.{name}" for name in ("conv1", "conv2", "conv_skip")))
    return (
        *(Rule(f"{source}.{name}.weight", f"{target}.{name}.kernel", Transform.CONV2D) for name in convolutions),
        # The bias belongs to the activation; it is (1, c, 1, 1) in the official repository's file.
        *(Rule(f"{source}.{name}.act_fn.bias", f"{target}.{name}.bias", reshape=True) for name in convolutions),
        *_linears(source, target, "motion_network.{i}"),
        Rule(f"{source}.motion_synthesis_weight", f"{target}.basis"),
    )


def _face_encoder(source: str, target: str) -> Rules:
    return (
        *weight_bias(f"{source}.conv1_local", f"{target}.conv1_local", Transform.CONV1D),
        *weight_bias(f"{source}.conv2", f"{target}.conv2", Transform.CONV1D),
        *weight_bias(f"{source}.conv3", f"{target}.conv3", Transform.CONV1D),
        *_linears(source, target, "out_proj"),
        Rule(f"{source}.padding_tokens", f"{target}.padding_tokens", reshape=True),
    )


_CONDITION = "condition_embedder"
_IMAGE = f"{_CONDITION}.image_embedder"
_CONDITION_EMBEDDER = (
    *_linears(f"{_CONDITION}.time_embedder", f"{_CONDITION}.time_embedder", "linear_1", "linear_2"),
    *_linears(_CONDITION, _CONDITION, "time_proj"),
    *_linears(f"{_CONDITION}.text_embedder", f"{_CONDITION}.text_embedder", "linear_1", "linear_2"),
    *norm(f"{_IMAGE}.norm1", f"{_IMAGE}.norm1"),
    *weight_bias(f"{_IMAGE}.ff.net.0.proj", f"{_IMAGE}.ff.linear_1"),
    *weight_bias(f"{_IMAGE}.ff.net.2", f"{_IMAGE}.ff.linear_2"),
    *norm(f"{_IMAGE}.norm2", f"{_IMAGE}.norm2"),
    Rule(f"{_IMAGE}.pos_embed", f"{_IMAGE}.pos_embed", reshape=True),
)

_VACE = (
    *_patch("vace_patch_embedding", "adapter.patch_embedding"),
    *weight_bias("vace_blocks.0.proj_in", "adapter.proj_in"),
    *_block("vace_blocks.{layer}", "adapter.blocks.block"),
    *weight_bias("vace_blocks.{layer}.proj_out", "adapter.blocks.proj_out"),
)

_ANIMATE = (
    *_patch("pose_patch_embedding", "adapter.pose_patch_embedding"),
    *_motion_encoder("motion_encoder", "adapter.motion_encoder"),
    *_face_encoder("face_encoder", "adapter.face_encoder"),
    *_linears("face_adapter.{layer}", "adapter.blocks", "to_q", "to_k", "to_v", "to_out"),
    Rule("face_adapter.{layer}.norm_q.weight", "adapter.blocks.norm_q.scale"),
    Rule("face_adapter.{layer}.norm_k.weight", "adapter.blocks.norm_k.scale"),
)

_SOUND, _INJECTOR = "casual_audio_encoder", "audio_injector.injector.{layer}"
_S2V = (
    *_patch("cond_encoder", "adapter.pose_embedding"),
    Rule("trainable_cond_mask.weight", "adapter.kinds"),
    *(
        rule
        for name in ("proj", "proj_2x", "proj_4x")
        for rule in _patch(f"frame_packer.{name}", f"adapter.frame_packer.{name}")
    ),
    Rule(f"{_SOUND}.weights", "adapter.audio_encoder.weights", reshape=True),
    *(
        rule
        for name in ("conv1_local", "conv1_global", "conv2", "conv3")
        for rule in weight_bias(f"{_SOUND}.encoder.{name}.conv", f"adapter.audio_encoder.{name}", Transform.CONV1D)
    ),
    *_linears(f"{_SOUND}.encoder", "adapter.audio_encoder", "final_linear"),
    Rule(f"{_SOUND}.encoder.padding_tokens", "adapter.audio_encoder.padding_tokens", reshape=True),
    *(rule for name in "qkv" for rule in weight_bias(f"{_INJECTOR}.{name}", f"adapter.blocks.attention.to_{name}")),
    *weight_bias(f"{_INJECTOR}.o", "adapter.blocks.attention.to_out"),
    Rule(f"{_INJECTOR}.norm_q.weight", "adapter.blocks.attention.norm_q.scale"),
    Rule(f"{_INJECTOR}.norm_k.weight", "adapter.blocks.attention.norm_k.scale"),
    *weight_bias("audio_injector.injector_adain_layers.{layer}.linear", "adapter.blocks.modulation"),
)

RULES: Rules = (
    *_patch("patch_embedding", "patch_embedding"),
    *_CONDITION_EMBEDDER,
    *_block("blocks.{layer}", "blocks"),
    *weight_bias("proj_out", "proj_out"),
    Rule("scale_shift_table", "scale_shift_table", reshape=True),
    *_VACE,
    *_ANIMATE,
    *_S2V,
)
