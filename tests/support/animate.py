"""A tiny Animate transformer in diffusers' words."""

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 12,
    "latent_channels": 4,
    "out_channels": 4,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 40,
    "num_layers": 4,
    "image_dim": None,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 6, "32": 4},
    "motion_encoder_size": 32,
    "motion_style_dim": 10,
    "motion_dim": 5,
    "motion_encoder_dim": 14,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
    "motion_encoder_batch_size": 4,
}
