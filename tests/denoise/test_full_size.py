"""Every config page of the image variants and of text to video: its denoise step at full size, by shapes alone."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from PIL import Image

from maxdiffusion import config, variants
from maxdiffusion.attention import AttentionPlan
from maxdiffusion.denoise import SOLVERS, Contexts, Denoiser, TwoPassGuidance, experts, split
from maxdiffusion.models.dit import Context, DiTConfig, Frames, WanTransformer

CONFIGS = Path(__file__).parents[2] / "configs"
FFN = {12: 8960, 24: 14336, 40: 13824}  # by heads
# page -> images given, what the transformer adds
PAGES = {
    "wan2.1_t2v_1.3b": (0, {}),
    "wan2.1_t2v_14b": (0, {}),
    "wan2.1_i2v_14b_480p": (1, {"image_dim": 1280, "added_kv_proj_dim": 5120}),
    "wan2.1_i2v_14b_720p": (1, {"image_dim": 1280, "added_kv_proj_dim": 5120}),
    "wan2.1_flf2v_14b": (2, {"image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514}),
    "wan2.2_t2v_a14b": (0, {}),
    "wan2.2_i2v_a14b": (1, {}),
    "wan2.2_ti2v_5b": (1, {}),
}


@pytest.mark.parametrize("page", PAGES)
def test_the_denoise_step_evaluates_abstractly(page, tmp_path):
    images, added = PAGES[page]
    Image.new("RGB", (64, 36)).save(tmp_path / "a.png")
    words = [f"{key}={tmp_path / 'a.png'}" for key in ("image", "last_image")[:images]]
    cfg = config.load([str(CONFIGS / f"{page}.yml"), "prompt=a", f"output_dir={tmp_path}", *words])
    spec = variants.get(cfg.model_name)
    dims, z = spec.dims, 48 if spec.model_type == "TI2V" else 16
    network = DiTConfig(
        num_layers=dims.num_layers,
        num_attention_heads=dims.num_attention_heads,
        attention_head_dim=dims.attention_head_dim,
        ffn_dim=FFN[dims.num_attention_heads],
        in_channels=dims.in_channels,
        out_channels=z,
        text_dim=4096,
        **added,
    )
    model = nnx.eval_shape(
        lambda: WanTransformer(
            network, AttentionPlan(), rngs=nnx.Rngs(0), weights_dtype=jnp.bfloat16, dtype=jnp.bfloat16
        )
    )
    f, h, w = spec.latent_grid(cfg.num_frames, cfg.height, cfg.width)
    full = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)  # noqa: E731
    frames = {
        "image_channels": Frames(channels=full(f, h, w, dims.in_channels - z)),
        "first_frame": Frames(first=full(1, h, w, z)),
    }
    given = [frames[name] for name in spec.conditions if name in frames]
    context = Context(full(512, 4096), full(257 * images, 1280) if added else None, *given)
    apply, params = split(model)
    graph = nnx.graphdef(model)
    prepared = jax.eval_shape(lambda params, context: nnx.merge(graph, params).prepare(context), params, context)
    solver = SOLVERS[cfg.solver]
    schedule = solver.schedule(cfg.num_inference_steps, cfg.flow_shift)
    strategy = experts.choose(cfg.boundary_ratio, cfg.guidance_scale, cfg.guidance_scale_2)
    denoiser = Denoiser(apply, strategy.segments(schedule.timesteps), schedule, solver, TwoPassGuidance())
    state = jax.eval_shape(denoiser.init, full(f, h, w, z))
    row = denoiser._rows(denoiser.plan(), 0, 1)
    after = jax.eval_shape(denoiser.step, params, Contexts(prepared, prepared), state, row)
    assert after.solver.x.shape == (1, f, h, w, z)
    assert len(prepared.sources) == (2 if added else 1)
