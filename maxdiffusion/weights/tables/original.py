"""Names of the official WAN repositories and of community files -> those of the diffusers layout, module by module.

Names of a module's own parameters (`weight`, `bias`, `gamma`) are equal in both. `{i}` and `{j}` stand for numbers.
A target of several modules splits the rows evenly. Facts: github.com/Wan-Video/Wan2.1 and Wan2.2 (wan/modules), and
the reference's `scripts/convert_wan_to_diffusers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

Table = Mapping[str, str | tuple[str, ...]]

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_BLOCK = {
    **{f"self_attn.{theirs}": f"attn1.{name}" for theirs, name in _ATTENTION.items()},
    **{f"cross_attn.{theirs}": f"attn2.{name}" for theirs, name in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",  # the norm before cross-attention, called after the order of use in the reference
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_MOTION = "motion_encoder.enc.net_app.convs"

DIT: Table = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    **{
        f"{blocks}.{{i}}.{theirs}": f"{blocks}.{{i}}.{name}"
        for blocks in ("blocks", "vace_blocks")
        for theirs, name in _BLOCK.items()
    },
    "vace_blocks.{i}.before_proj": "vace_blocks.{i}.proj_in",
    "vace_blocks.{i}.after_proj": "vace_blocks.{i}.proj_out",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    # Animate. The residual blocks of the motion encoder are convs.1 to convs.7, between its first and last convolution.
    f"{_MOTION}.0.0": "motion_encoder.conv_in",
    f"{_MOTION}.0.1": "motion_encoder.conv_in.act_fn",
    **{
        f"{_MOTION}.{i + 1}.{theirs}": f"motion_encoder.res_blocks.{i}.{name}"
        for i in range(7)
        for theirs, name in {
            "conv1.0": "conv1",
            "conv1.1": "conv1.act_fn",
            "conv2.1": "conv2",
            "conv2.2": "conv2.act_fn",
            "skip.1": "conv_skip",
        }.items()
    },
    f"{_MOTION}.8": "motion_encoder.conv_out",
    "motion_encoder.enc.fc.{i}": "motion_encoder.motion_network.{i}",
    "motion_encoder.dec.direction.weight": "motion_encoder.motion_synthesis_weight",
    **{f"face_encoder.{conv}.conv": f"face_encoder.{conv}" for conv in ("conv1_local", "conv2", "conv3")},
    "face_adapter.fuser_blocks.{i}.linear1_q": "face_adapter.{i}.to_q",
    "face_adapter.fuser_blocks.{i}.linear1_kv": ("face_adapter.{i}.to_k", "face_adapter.{i}.to_v"),
    "face_adapter.fuser_blocks.{i}.linear2": "face_adapter.{i}.to_out",
    "face_adapter.fuser_blocks.{i}.q_norm": "face_adapter.{i}.norm_q",
    "face_adapter.fuser_blocks.{i}.k_norm": "face_adapter.{i}.norm_k",
}

# Animate 2 in diffusers: the official names but for those within the attentions.
ANIMATE2: Table = {
    f"blocks.{{i}}.{theirs}.{name}": f"blocks.{{i}}.{attention}.{name}"
    for theirs, attention in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "norm_added_k")
}
TRANSFORMER: Table = {**DIT, **ANIMATE2}

_LAYER = "encoder.block.{i}.layer"

UMT5: Table = {
    "token_embedding": "shared",
    "blocks.{i}.norm1": f"{_LAYER}.0.layer_norm",
    **{f"blocks.{{i}}.attn.{name}": f"{_LAYER}.0.SelfAttention.{name}" for name in ("q", "k", "v", "o")},
    "blocks.{i}.pos_embedding.embedding": f"{_LAYER}.0.SelfAttention.relative_attention_bias",
    "blocks.{i}.norm2": f"{_LAYER}.1.layer_norm",
    "blocks.{i}.ffn.gate.0": f"{_LAYER}.1.DenseReluDense.wi_0",
    "blocks.{i}.ffn.fc1": f"{_LAYER}.1.DenseReluDense.wi_1",
    "blocks.{i}.ffn.fc2": f"{_LAYER}.1.DenseReluDense.wo",
    "norm": "encoder.final_layer_norm",
}

# The names of llama.cpp, which GGUF files have (gguf.TENSOR_NAMES).
GGUF_UMT5: Table = {
    "token_embd": "shared",
    "enc.blk.{i}.attn_norm": f"{_LAYER}.0.layer_norm",
    **{f"enc.blk.{{i}}.attn_{name}": f"{_LAYER}.0.SelfAttention.{name}" for name in ("q", "k", "v", "o")},
    "enc.blk.{i}.attn_rel_b": f"{_LAYER}.0.SelfAttention.relative_attention_bias",
    "enc.blk.{i}.ffn_norm": f"{_LAYER}.1.layer_norm",
    "enc.blk.{i}.ffn_gate": f"{_LAYER}.1.DenseReluDense.wi_0",
    "enc.blk.{i}.ffn_up": f"{_LAYER}.1.DenseReluDense.wi_1",
    "enc.blk.{i}.ffn_down": f"{_LAYER}.1.DenseReluDense.wo",
    "enc.output_norm": "encoder.final_layer_norm",
}

TEXT_ENCODER: Table = {**UMT5, **GGUF_UMT5}

_TOWER = "encoder.layers.{i}"

CLIP: Table = {
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.patch_embedding": "embeddings.patch_embedding",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.pre_norm": "pre_layrnorm",
    **{
        f"visual.transformer.{{i}}.{theirs}": f"{_TOWER}.{name}"
        for theirs, name in {
            "norm1": "layer_norm1",
            "attn.proj": "self_attn.out_proj",
            "norm2": "layer_norm2",
            "mlp.0": "mlp.fc1",
            "mlp.2": "mlp.fc2",
        }.items()
    },
    "visual.transformer.{i}.attn.to_qkv": tuple(f"{_TOWER}.self_attn.{name}_proj" for name in "qkv"),
    "visual.post_norm": "post_layernorm",
    "visual.head": "visual_projection.weight",
}


def _residual(theirs: str, name: str) -> Table:
    parts = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
    return {f"{theirs}.{old}": f"{name}.{new}" for old, new in {**parts, "shortcut": "conv_shortcut"}.items()}


def _resample(theirs: str, name: str) -> Table:
    return {f"{theirs}.{part}": f"{name}.{part}" for part in ("resample.1", "time_conv")}


def _coder(coder: str) -> Table:
    """The part common to encoder and decoder of both VAEs."""
    middle, attention = f"{coder}.middle", f"{coder}.mid_block.attentions.0"
    return {
        f"{coder}.conv1": f"{coder}.conv_in",
        **_residual(f"{middle}.0", f"{coder}.mid_block.resnets.0"),
        **{f"{middle}.1.{part}": f"{attention}.{part}" for part in ("norm", "to_qkv", "proj")},
        **_residual(f"{middle}.2", f"{coder}.mid_block.resnets.1"),
        f"{coder}.head.0": f"{coder}.norm_out",
        f"{coder}.head.2": f"{coder}.conv_out",
    }


_VAE: Table = {
    **_coder("encoder"),
    **_coder("decoder"),
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
}


def _stage(stage: int) -> Table:
    """2.1 lists the decoder's layers in a row: each stage is three residual blocks and an upsampler."""
    theirs, name = "decoder.upsamples", f"decoder.up_blocks.{stage}"
    residual = [_residual(f"{theirs}.{4 * stage + j}", f"{name}.resnets.{j}") for j in range(3)]
    resample = _resample(f"{theirs}.{4 * stage + 3}", f"{name}.upsamplers.0")
    return {old: new for rows in (*residual, resample) for old, new in rows.items()}


VAE21: Table = {
    **_VAE,
    **_residual("encoder.downsamples.{i}", "encoder.down_blocks.{i}"),
    **_resample("encoder.downsamples.{i}", "encoder.down_blocks.{i}"),
    **_stage(0),
    **_stage(1),
    **_stage(2),
    **_stage(3),
}

# Nested: two residual blocks and a downsampler, three and an upsampler.
VAE22: Table = {
    **_VAE,
    **_residual("encoder.downsamples.{i}.downsamples.{j}", "encoder.down_blocks.{i}.resnets.{j}"),
    **_resample("encoder.downsamples.{i}.downsamples.2", "encoder.down_blocks.{i}.downsampler"),
    **_residual("decoder.upsamples.{i}.upsamples.{j}", "decoder.up_blocks.{i}.resnets.{j}"),
    **_resample("decoder.upsamples.{i}.upsamples.3", "decoder.up_blocks.{i}.upsampler"),
}

VAE: Table = {**VAE21, **VAE22}  # names that both share have the same meaning
