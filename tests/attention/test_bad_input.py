"""Illegal combinations of attention and mesh are refused before anything loads, with the legal choices."""

import dataclasses
import re

import pytest

from maxdiffusion import request
from maxdiffusion.errors import UserError
from maxdiffusion.request.layout import lay_out
from maxdiffusion.request.nets import read_configs
from maxdiffusion.request.session import recipe_of


@dataclasses.dataclass
class Device:
    """As much of a device as is asked for before a mesh is made of it."""

    platform: str
    device_kind: str
    slice_index: int = 0


CPU = [Device("cpu", "cpu")] * 8
GPU = [Device("gpu", "NVIDIA H100 80GB HBM3")] * 8
TPU = [Device("tpu", "TPU v6 lite")] * 8
SLICES = [Device("tpu", "TPU v6 lite", index) for index in (0, 0, 0, 0, 1, 1, 1, 1)]
WHEN_READ = "the words are refused as such"

# (words, devices, heads, part of the error)
CASES = [
    # values
    ("attention=ulyses_ring", WHEN_READ, 40, "did you mean ulysses_ring?"),
    ("ulysses_shards=0", WHEN_READ, 40, "a positive integer, or -1"),
    ("ulysses_shards=some", WHEN_READ, 40, "a valid integer"),
    ("ulysses_attention_chunks=0", WHEN_READ, 40, "greater than or equal to 1"),
    ("ring_direction=both", WHEN_READ, 40, "'one_way' or 'two_way'"),
    ("use_base2_exp=perhaps", WHEN_READ, 40, "a valid boolean"),
    ("attention_vmem_limit_kib=0", WHEN_READ, 40, "the default is 61440"),
    ("ici_data_parallelism=half", WHEN_READ, 40, "a valid integer"),
    ("flash_block_sizes=512", WHEN_READ, 40, "a mapping, such as {block_q: 2048, block_kv: 1024}"),
    ("flash_block_sizes={block_x: 512}", WHEN_READ, 40, "'block_q', 'block_kv' or 'block_kv_compute'"),
    ("flash_block_sizes={block_q: 100}", WHEN_READ, 40, "not a multiple of 16; choose 96 or 112"),
    ("flash_block_sizes={block_kv: 1000}", WHEN_READ, 40, "not a multiple of 128; choose 896 or 1024"),
    ("flash_block_sizes={block_kv: 512, block_kv_compute: 384}", WHEN_READ, 40, "choose 128 or 256 or 512"),
    ("flash_block_sizes={block_kv_compute: 384}", WHEN_READ, 40, "give block_kv as well"),
    # heads, shards and context
    ("ulysses_shards=3", WHEN_READ, 40, "does not divide the 40 heads of wan2.1-t2v-14b; choose 1 or 2 or 4 or 5 or 8"),
    ("ulysses_shards=5 ici_context_parallelism=8", WHEN_READ, 40, "context axis of 8 devices; choose 1 or 2 or 4 or 8"),
    ("ulysses_shards=2 attention=ring", WHEN_READ, 40, "attention=ulysses or ulysses_ring"),
    ("ulysses_shards=2 attention=flash", WHEN_READ, 40, "attention=ulysses or ulysses_ring"),
    ("ring_size=2 ulysses_size=2 ici_context_parallelism=8", WHEN_READ, 40, "make 4; leave one of them out"),
    ("attention=ulysses", CPU, 12, "cannot split 12 heads; choose 1 or 2 or 4, with attention=ulysses_ring"),
    ("attention=ulysses ulysses_shards=4", CPU, 40, "ulysses_shards=8 or attention=ulysses_ring"),
    ("attention=ulysses_ring ulysses_shards=8", CPU, 12, "cannot split 12 heads; choose 1 or 2 or 4"),
    ("attention=ulysses_ring ulysses_shards=8 ici_tensor_parallelism=2", CPU, 40, "4 device(s) .* choose 1 or 2 or 4"),
    ("attention=ulysses_ring ulysses_shards=4 ici_tensor_parallelism=2", CPU, 12, "12 heads over 2 .* choose 1 or 2"),
    ("attention=ulysses_ring ulysses_shards=2", CPU[:1], 40, "does not divide the 1 device(s) .* choose 1"),
    (
        "attention=ulysses_ring ulysses_shards=8 dcn_context_parallelism=2 dcn_data_parallelism=1",
        SLICES,
        40,
        "1 or 2 or 4",
    ),
    ("ici_tensor_parallelism=8", CPU, 12, "choose 1 or 2 or 3 or 4 or 6 or 12"),
    # options of a scheme
    ("attention=ulysses_ring ulysses_shards=4 ulysses_attention_chunks=3", CPU, 40, "choose 1 or 2 or 5 or 10"),
    ("attention=ulysses ulysses_attention_chunks=2", CPU, 8, "1 heads that each .* choose 1"),
    ("attention=ring ulysses_attention_chunks=2", CPU, 40, "write ulysses_attention_chunks=1 or"),
    ("ulysses_attention_chunks=2", CPU[:1], 40, "write ulysses_attention_chunks=1 or"),
    ("attention=ulysses ring_direction=two_way", CPU, 40, "write ring_direction=one_way or"),
    ("attention=dot_product ring_direction=two_way", CPU, 40, "write ring_direction=one_way or"),
    # kernels and their options
    ("attention=flash", CPU, 40, "lacks on cpu; choose auto or one of dot_product, chunked, ring"),
    ("attention=tokamax_ring", GPU, 40, "lacks on gpu; choose auto or one of dot_product, chunked, cudnn_flash, ring"),
    ("attention=cudnn_flash", TPU, 40, "lacks on tpu; choose auto or one of dot_product, chunked, flash"),
    ("attention=cudnn_flash activations_dtype=float32", GPU, 40, "write activations_dtype=bfloat16 or attention=auto"),
    ("flash_block_sizes={block_q: 512}", CPU, 40, "kernel chunked, which takes no options; leave it out or choose"),
    ("flash_block_sizes={block_q: 512}", GPU, 40, "kernel cudnn_flash, which takes no options"),
    ("attention=splash use_base2_exp=true", TPU, 40, "kernel splash, which takes block_q, block_kv, block_kv_compute;"),
    ("attention=dot_product use_experimental_scheduler=true", TPU, 40, "choose a kernel that takes it (tokamax_splash"),
    ("attention=flash flash_block_sizes={block_q: 3024}", TPU, 40, "kernel flash needs; choose 2944 or 3072"),
    ("attention=tokamax_flash attention_vmem_limit_kib=65536", TPU, 40, "takes block_q, .*use_experimental_scheduler"),
    # the mesh and its rules
    ("ici_data_parallelism=-1", WHEN_READ, 40, "ici_context_parallelism are both -1"),
    ("ici_tensor_parallelism=0", WHEN_READ, 40, "a positive integer, or -1 to fill"),
    ("ici_data_parallelism=3", CPU, 40, "needs a multiple of 3 devices, but there are 8; .*1, 2, 4, 8"),
    ("ici_context_parallelism=16", CPU, 40, "needs 16 devices, but there are 8; .*1, 2, 4, 8"),
    ("dcn_context_parallelism=2 dcn_data_parallelism=1", CPU, 40, "needs 2 slices, but there are 1"),
    ("logical_axis_rules=[[nose,data]]", None, 40, "choose one of batch, sequence, heads"),
    ("logical_axis_rules=[[mlp,tail]]", None, 40, "choose from data, fsdp, ring, ulysses, tensor or context"),
    (
        "logical_axis_rules=[[sequence,null]] attention=ring",
        None,
        40,
        "needs it on ('ring', 'ulysses'); remove that rule",
    ),
]


@pytest.mark.parametrize(("words", "devices", "heads", "says"), CASES, ids=[words for words, *_ in CASES])
def test_refused_before_loading(tmp_path, words, devices, heads, says):
    (tmp_path / "case.yml").write_text(f"model_name: wan2.1-t2v-14b\nprompt: x\noutput_dir: {tmp_path}\n")
    split = re.findall(r"\S+=(?:\{.*?\}|\S+)", words)
    with pytest.raises(UserError) as refusal:
        job = request.load([str(tmp_path / "case.yml"), *split])
        assert devices != WHEN_READ
        configs = read_configs(job)
        transformer = dataclasses.replace(configs["transformer"], num_attention_heads=heads)
        lay_out(job, recipe_of(job), {**configs, "transformer": transformer}, devices)
    assert re.search(re.escape(says).replace(r"\.\*", ".*"), str(refusal.value)), refusal.value
    assert "\n" not in str(refusal.value)
