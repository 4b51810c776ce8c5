"""The transformers of the control configs at their official sizes, by shapes alone."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from maxdiffusion import config
from maxdiffusion.attention import AttentionPlan
from maxdiffusion.config import parts
from maxdiffusion.models.dit import Context, DiTConfig, Frames, WanTransformer
from maxdiffusion.models.dit.animate import Performance
from maxdiffusion.models.dit.vace import Control
from maxdiffusion.variants import get
from tests.weights.test_nets import OFFICIAL

OF_14B = {
    "num_layers": 40,
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
}
PAGES = {
    "wan2.1_vace_1.3b": (),
    "wan2.1_vace_14b": (),
    "wan2.2_animate_14b": ("image=a", "pose_video=.", "face_video=.", "size=1280*720"),
}


@pytest.mark.parametrize("page", PAGES)
def test_the_config_evaluates_abstractly(page):
    cfg = config.load([f"configs/{page}.yml", "prompt=a", *PAGES[page]])
    spec, cut = get(cfg.model_name), parts.of(cfg)
    own, h, w = spec.latent_grid(cut.length, cfg.height, cfg.width)
    network = DiTConfig.from_json(OF_14B | OFFICIAL[cfg.model_name][1])
    model = nnx.eval_shape(
        lambda: WanTransformer(
            network, AttentionPlan(), rngs=nnx.Rngs(0), weights_dtype=jnp.bfloat16, dtype=jnp.bfloat16
        )
    )
    full = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)  # noqa: E731
    f = cut.leading + own
    if spec.model_type == "VACE":
        side = Control(full(f, h, w, 96), full(len(network.side.vace_layers)))
        context = Context(full(512, 4096), side=side)
    else:
        side = Performance(full(own, h, w, 16), full(cut.length, 512, 512, 3))
        context = Context(full(512, 4096), full(257, 1280), Frames(channels=full(f, h, w, 20)), side)
    graph, params = nnx.split(model)
    velocity = jax.eval_shape(lambda p, *args: nnx.merge(graph, p)(*args), params, full(f, h, w, 16), full(), context)
    assert velocity.shape == (1, f, h, w, 16)
