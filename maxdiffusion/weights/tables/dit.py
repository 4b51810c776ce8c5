"""Names of `diffusers.WanTransformer3DModel` and of what its relatives add."""

from maxdiffusion.weights.rule import Rule, Transform


def _linear(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"{target}.kernel", Transform.LINEAR),
        Rule(f"{source}.bias", f"{target}.bias"),
    )


def _patch(source: str, target: str) -> tuple[Rule, ...]:
    """The kernel acts on folded patches (t, h, w, c), so the convolution's four input axes become one."""
    return (
        Rule(f"{source}.weight", f"{target}.kernel", Transform.CONV3D, reshape=True),
        Rule(f"{source}.bias", f"{target}.bias"),
    )


def _block(source: str, target: str) -> tuple[Rule, ...]:
    attentions = [(f"{source}.{name}", f"{target}.{name}") for name in ("attn1", "attn2")]
    return (
        *(
            rule
            for a, b in attentions
            for name in ("to_q", "to_k", "to_v")
            for rule in _linear(f"{a}.{name}", f"{b}.{name}")
        ),
        *(rule for a, b in attentions for rule in _linear(f"{a}.to_out.0", f"{b}.to_out")),
        *(Rule(f"{a}.{name}.weight", f"{b}.{name}.scale") for a, b in attentions for name in ("norm_q", "norm_k")),
        *_linear(f"{source}.ffn.net.0.proj", f"{target}.ffn.linear_1"),
        *_linear(f"{source}.ffn.net.2", f"{target}.ffn.linear_2"),
        Rule(f"{source}.norm2.weight", f"{target}.norm2.scale"),
        Rule(f"{source}.norm2.bias", f"{target}.norm2.bias"),
        Rule(f"{source}.scale_shift_table", f"{target}.scale_shift_table", reshape=True),
    )


_EMBEDDER = (
    "time_embedder.linear_1",
    "time_embedder.linear_2",
    "time_proj",
    "text_embedder.linear_1",
    "text_embedder.linear_2",
)

_VACE = (
    *_patch("vace_patch_embedding", "side.patch_embedding"),
    *_linear("vace_blocks.0.proj_in", "side.proj_in"),
    *_block("vace_blocks.{layer}", "side.blocks.block"),
    *_linear("vace_blocks.{layer}.proj_out", "side.blocks.proj_out"),
)

_CONVS = ("conv_in", "conv_out", "res_blocks.{i}.conv1", "res_blocks.{i}.conv2", "res_blocks.{i}.conv_skip")
_FACE_CONVS = ("conv1_local", "conv2", "conv3")

_ANIMATE = (
    *_patch("pose_patch_embedding", "side.pose_patch_embedding"),
    *(Rule(f"motion_encoder.{name}.weight", f"side.motion_encoder.{name}.kernel", Transform.CONV2D) for name in _CONVS),
    *(Rule(f"motion_encoder.{name}.act_fn.bias", f"side.motion_encoder.{name}.bias") for name in _CONVS),
    *_linear("motion_encoder.motion_network.{i}", "side.motion_encoder.motion_network.{i}"),
    Rule("motion_encoder.motion_synthesis_weight", "side.motion_encoder.basis"),
    *(
        Rule(f"face_encoder.{name}.weight", f"side.face_encoder.{name}.kernel", Transform.CONV1D)
        for name in _FACE_CONVS
    ),
    *(Rule(f"face_encoder.{name}.bias", f"side.face_encoder.{name}.bias") for name in _FACE_CONVS),
    *_linear("face_encoder.out_proj", "side.face_encoder.out_proj"),
    Rule("face_encoder.padding_tokens", "side.face_encoder.padding_tokens", reshape=True),
    *(
        rule
        for name in ("to_q", "to_k", "to_v", "to_out")
        for rule in _linear(f"face_adapter.{{layer}}.{name}", f"side.adapters.{name}")
    ),
    *(Rule(f"face_adapter.{{layer}}.{name}.weight", f"side.adapters.{name}.scale") for name in ("norm_q", "norm_k")),
)

RULES: tuple[Rule, ...] = (
    *_patch("patch_embedding", "patch_embedding"),
    *(rule for name in _EMBEDDER for rule in _linear(f"condition_embedder.{name}", f"condition_embedder.{name}")),
    *_block("blocks.{layer}", "blocks"),
    *_linear("proj_out", "proj_out"),
    Rule("scale_shift_table", "scale_shift_table", reshape=True),
    *_VACE,
    *_ANIMATE,
)
