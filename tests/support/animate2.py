"""A tiny Animate 2 transformer of diffusers, whose flex attention is replaced by dense attention with the same mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanAnimate2Transformer3DModel
from diffusers.models.transformers import transformer_wan_animate_2 as reference
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

from tests.support import official

CONFIG: dict[str, Any] = {
    "dim": 48,
    "num_heads": 2,
    "ffn_dim": 40,
    "freq_dim": 32,
    "text_dim": 32,
    "num_layers": 11,  # the negative branch of guidance leaves out the tenth
}


def _mask(function: Any, B: Any, H: Any, Q_LEN: int, KV_LEN: int, device: Any, _compile: bool) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.long)
    return function(zero, zero, torch.arange(Q_LEN)[:, None], torch.arange(KV_LEN)[None])


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, **_: Any) -> torch.Tensor:
    """Attention of b s n d; rows without keys, which are padding, give NaN that nothing reads."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2)


def transformer() -> WanAnimate2Transformer3DModel:
    """Random, with the attention of a CPU."""
    reference.create_block_mask, reference.dispatch_attention_fn = _mask, _dense
    torch.manual_seed(0)
    net = WanAnimate2Transformer3DModel(**CONFIG).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def write_checkpoint(folder: Path, net: WanAnimate2Transformer3DModel) -> Path:
    """See `official.write_checkpoint`."""
    sizes = {name: CONFIG[name] for name in ("dim", "num_heads")}
    return official.write_checkpoint(folder, "wan2.2-animate2", transformers={"transformer": net}, config=sizes)


def words(checkpoint: Path, folder: Path) -> list[str]:
    """A run of that checkpoint in fp32, without its inputs; writes its page into `folder`."""
    (folder / "animate2.yml").write_text("model_name: wan2.2-animate2\nprompt: a fox dances\n")
    return [str(folder / "animate2.yml"), *official.words(checkpoint), "segment_frame_length=9", *official.FP32]


def velocity(
    net: WanAnimate2Transformer3DModel,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    condition: torch.Tensor,
    text: torch.Tensor,
    image: torch.Tensor,
    driving: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    negative: bool,
) -> torch.Tensor:
    """Both passes, as the modular pipeline calls them, of one video c f h w; `driving` has latents, text and image."""
    video, video_text, video_image = driving
    cache = WanAnimate2KVCache(net.config.num_layers)
    grid = torch.tensor([[video.shape[1], video.shape[2] // 2, video.shape[3] // 2]])
    with torch.no_grad():
        net(
            [video],
            timestep=timestep,
            encoder_hidden_states=[video_text],
            encoder_hidden_states_image=video_image[None],
            condition_latents=[torch.cat([torch.ones(4, *video.shape[1:]), video])],
            kv_cache=cache,
            kv_cache_mode="extract",
            seq_len=int(grid.prod()),
            offset_grid_sizes=grid,
        )
        made = net(
            [latents],
            timestep=timestep,
            encoder_hidden_states=[text],
            encoder_hidden_states_image=image[None],
            condition_latents=[condition],
            kv_cache=cache,
            kv_cache_mode="cached",
            seq_len=latents.shape[1] * int(grid[0, 1:].prod()),
            reference_grid_sizes=grid,
            origin_len=4 * video.shape[1] - 3,
            origin_area=[8 * video.shape[2], 8 * video.shape[3]],
            is_uncondtion=negative,
        )
    return made.sample[0]
