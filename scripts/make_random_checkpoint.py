"""Writes a random WAN checkpoint of any size in the diffusers layout, for load and memory tests.

    python scripts/make_random_checkpoint.py FOLDER --preset 1.3b --dtype bf16 --nets transformer
    python scripts/make_random_checkpoint.py FOLDER --preset tiny --set transformer.num_layers=4 vae.base_dim=16
    python scripts/make_random_checkpoint.py FOLDER --nets text_encoder transformer transformer_2 vae  # two experts

Names and shapes come from the reference's own classes, built without memory on torch's meta device (diffusers and torch
are development requirements); the numbers stream to the disk, so that 14B needs no more host memory than tiny does.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers
import ml_dtypes
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from maxdiffusion.models.umt5.config import XXL
from maxdiffusion.variants import VARIANTS

DTYPES = {"fp32": ("F32", np.float32), "bf16": ("BF16", ml_dtypes.bfloat16), "fp16": ("F16", np.float16)}
CHUNK = 2**22  # elements drawn at once

# What differs from the defaults of the reference's classes, which are those of the 14B model and its VAE.
PRESETS: dict[str, dict[str, dict]] = {
    **{
        size: {
            "transformer": dict(VARIANTS[f"wan2.1-t2v-{size}"].network or {}),
            "vae": {},
            "text_encoder": dataclasses.asdict(XXL),
        }
        for size in ("14b", "1.3b")
    },
    "tiny": {
        "transformer": {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "ffn_dim": 32,
            "text_dim": 32,
            "freq_dim": 64,
        },
        "vae": {"base_dim": 8},
        "text_encoder": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
    },
}


PRESETS["tiny-animate"] = PRESETS["tiny"] | {
    "transformer": PRESETS["tiny"]["transformer"]
    | {
        "in_channels": 36,
        "latent_channels": 16,
        "num_layers": 4,
        "image_dim": 16,
        "added_kv_proj_dim": 24,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 6, "32": 4},
        "motion_encoder_size": 32,
        "motion_style_dim": 10,
        "motion_dim": 5,
        "motion_encoder_dim": 14,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    },
    "image_encoder": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}


def build(net: str, config: dict) -> torch.nn.Module:
    if net.startswith("transformer"):
        kind = diffusers.WanAnimateTransformer3DModel if "motion_dim" in config else diffusers.WanTransformer3DModel
        return kind(**config)
    if net == "image_encoder":
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config))
    if net == "vae":
        return diffusers.AutoencoderKLWan(**config)
    config = {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "tie_word_embeddings": False} | config
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**config))


def write_net(folder: Path, net: str, config: dict, dtype: str, shard_bytes: int, seed: int) -> int:
    """Writes config.json and the weights; returns the number of parameters."""
    with torch.device("meta"):
        model = build(net, config)
    if net.endswith("_encoder"):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    else:
        model.save_config(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if net == "text_encoder":
        shapes.pop("encoder.embed_tokens.weight")  # tied to shared.weight, as in the official files
    write_weights(
        folder, "model" if net.endswith("_encoder") else "diffusion_pytorch_model", shapes, dtype, shard_bytes, seed
    )
    return sum(map(math.prod, shapes.values()))


def write_weights(
    folder: Path, stem: str, shapes: dict[str, tuple[int, ...]], dtype: str, shard_bytes: int, seed: int = 0
) -> None:
    """One safetensors file, or shards with an index where they exceed `shard_bytes`."""
    size = np.dtype(DTYPES[dtype][1]).itemsize
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, shape in shapes.items():
        if shards[-1] and math.prod(shape) * size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = shape
        room -= math.prod(shape) * size
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", shapes, dtype, seed)
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, shard, dtype, seed + i)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(map(math.prod, shapes.values())) * size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_file(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    name_on_disk, kind = DTYPES[dtype]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(kind).itemsize
        header[name] = {"dtype": name_on_disk, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for part in numbers(rng, name, shape):
                file.write(part.astype(kind).tobytes())


def numbers(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Values that keep activations of order one: norm gains near 1, biases near 0, kernels 1/sqrt(fan in)."""
    gain = "norm" in name and not name.endswith("bias")
    scale = 0.02 if gain or len(shape) < 2 else max(math.prod(shape[1:]), 1) ** -0.5
    for start in range(0, math.prod(shape), CHUNK):
        count = min(CHUNK, math.prod(shape) - start)
        yield rng.standard_normal(count, np.float32) * np.float32(scale) + np.float32(gain)


def write_tokenizer(folder: Path) -> None:
    """One token per byte; pad 0, </s> 1, <unk> 2, </s> appended, as T5 does."""
    vocab = {
        token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--nets", nargs="+", default=["text_encoder", "transformer", "vae"], help="write only these")
    parser.add_argument("--pipeline", default="WanPipeline", help="the pipeline's class in model_index.json")
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="NET.KEY=VALUE", help="changes to the preset's configs")
    args = parser.parse_args(argv)

    configs = {net: dict(config) for net, config in PRESETS[args.preset].items()}
    for change in args.set:
        key, value = change.split("=", 1)
        net, key = key.split(".", 1)
        configs[net][key] = ast.literal_eval(value)

    args.folder.mkdir(parents=True, exist_ok=True)
    index = {
        "_class_name": args.pipeline,
        "_diffusers_version": diffusers.__version__,
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
    (args.folder / "model_index.json").write_text(json.dumps(index, indent=2))
    diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    ).save_config(args.folder / "scheduler")
    write_tokenizer(args.folder / "tokenizer")
    for net in args.nets:
        folder = args.folder / net
        folder.mkdir(exist_ok=True)
        config, seed = configs["transformer" if net == "transformer_2" else net], args.seed + (net == "transformer_2")
        count = write_net(folder, net, config, args.dtype, int(args.shard_gb * 2**30), seed)
        print(f"{net}: {count:,} parameters, {args.dtype}")


if __name__ == "__main__":
    main()
