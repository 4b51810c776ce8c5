import importlib.util
import subprocess
import sys

import pytest

from maxdiffusion.attention.kernels import KERNELS
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError


def parse(name, heads=40, context=8, **given):
    return AttentionPlan.parse(name, heads=heads, context=context, **given)


@pytest.mark.parametrize(
    ("name", "given", "want"),
    [
        ("dot_product", {}, ("local", "dot_product", 1, 1)),
        ("chunked", {}, ("local", "chunked", 1, 1)),
        ("ring", {}, ("ring", "chunked", 8, 1)),
        ("ring", {"ulysses_shards": 1}, ("ring", "chunked", 8, 1)),
        ("ulysses", {}, ("ulysses", "chunked", 1, 8)),
        ("ulysses", {"ulysses_shards": -1}, ("ulysses", "chunked", 1, 8)),
        ("ulysses", {"ulysses_shards": 8}, ("ulysses", "chunked", 1, 8)),
        ("ulysses_ring", {"ulysses_shards": 2}, ("ulysses_ring", "chunked", 4, 2)),
        ("ulysses_ring", {}, ("ulysses_ring", "chunked", 1, 8)),
        ("ulysses_ring", {"heads": 12}, ("ulysses_ring", "chunked", 2, 4)),
        ("ulysses_ring", {"heads": 12, "tensor": 2}, ("ulysses_ring", "chunked", 4, 2)),
        ("auto", {}, ("ulysses", "chunked", 1, 8)),
        ("auto", {"heads": 12}, ("ulysses_ring", "chunked", 2, 4)),
        ("auto", {"heads": 7}, ("ring", "chunked", 8, 1)),
        ("auto", {"ulysses_shards": 2}, ("ulysses_ring", "chunked", 4, 2)),
        ("auto", {"context": 1}, ("local", "chunked", 1, 1)),
        ("auto", {"heads": 12, "chunks": 3}, ("ulysses_ring", "chunked", 2, 4)),
        ("auto", {"heads": 12, "chunks": 6}, ("ulysses_ring", "chunked", 4, 2)),
        ("auto", {"ring_direction": "two_way"}, ("ulysses_ring", "chunked", 2, 4)),
        ("auto", {"slices": 2}, ("ulysses_ring", "chunked", 2, 4)),
        ("auto", {"platform": "gpu", "dtype": "bfloat16"}, ("ulysses", "cudnn_flash", 1, 8)),
        ("auto", {"platform": "gpu"}, ("ulysses", "chunked", 1, 8)),
        ("ring", {"platform": "gpu", "dtype": "float16"}, ("ring", "cudnn_flash", 8, 1)),
        ("cudnn_flash", {"platform": "gpu", "dtype": "bfloat16"}, ("local", "cudnn_flash", 1, 1)),
        ("auto", {"platform": "tpu"}, ("ulysses", "flash", 1, 8)),
        ("flash", {"platform": "tpu"}, ("local", "flash", 1, 1)),
        ("splash", {"platform": "tpu"}, ("local", "splash", 1, 1)),
        ("tokamax_flash", {"platform": "tpu"}, ("local", "tokamax_splash", 1, 1)),
        ("tokamax_ring", {"platform": "tpu"}, ("ring", "tokamax_splash", 8, 1)),
        *[(n, {"context": 1}, ("local", "chunked", 1, 1)) for n in ("ring", "ulysses", "ulysses_ring")],
    ],
)
def test_names(name, given, want):
    plan = parse(name, **given)
    assert (plan.scheme, plan.kernel, plan.ring, plan.ulysses) == want
    assert plan.scheme == "local" or plan.context == 8


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("flsah", {}, "auto, dot_product, chunked, flash"),
        ("flash", {}, "choose auto or one of dot_product, chunked, ring, ulysses, ulysses_ring"),
        ("tokamax_flash", {}, "lacks on cpu"),
        ("tokamax_ring", {"platform": "gpu"}, "lacks on gpu"),
        ("cudnn_flash", {}, "lacks on cpu"),
        ("cudnn_flash", {"platform": "gpu"}, "bfloat16 or float16, not float32; write activations_dtype=bfloat16"),
        ("ulysses_ring", {"chunks": 3}, "5 heads that each of 8 .* choose 1 or 5"),
        (
            "ulysses_ring",
            {"ulysses_shards": 4, "chunks": 3},
            "10 heads that each of 4 ulysses_shards.*1 or 2 or 5 or 10",
        ),
        ("ulysses_ring", {"context": 1, "chunks": 2}, "write ulysses_attention_chunks=1"),
        ("ring", {"chunks": 2}, "choose a larger ulysses_shards"),
        ("ulysses", {"ring_direction": "two_way"}, "write ring_direction=one_way"),
        ("ring", {"ring_direction": "clockwise"}, "choose one_way or two_way"),
        ("auto", {"platform": "toaster"}, "choose cpu, gpu or tpu"),
        ("ulysses_ring", {"ulysses_shards": 3}, "choose 1 or 2 or 4 or 8"),
        ("ulysses_ring", {"ulysses_shards": 16}, "choose 1 or 2 or 4 or 8"),
        ("ulysses_ring", {"ulysses_shards": 0}, "choose 1 or 2 or 4 or 8"),
        ("ulysses_ring", {"ulysses_shards": -2}, "choose 1 or 2 or 4 or 8"),
        ("ulysses_ring", {"ulysses_shards": 8, "heads": 12}, "choose 1 or 2 or 4"),
        ("ulysses_ring", {"ulysses_shards": 8, "tensor": 2}, "choose 1 or 2 or 4"),
        ("ulysses_ring", {"ulysses_shards": 2, "context": 1}, "does not divide the 1 device"),
        ("ulysses", {"heads": 12}, "choose 1 or 2 or 4, with attention=ulysses_ring"),
        ("ulysses", {"ulysses_shards": 4}, "ulysses_shards=8 or attention=ulysses_ring"),
        ("ulysses", {"tensor": 2}, "choose 1 or 2 or 4, with attention=ulysses_ring"),
        ("ring", {"ulysses_shards": 2}, "choose ulysses_ring"),
        ("dot_product", {"ulysses_shards": 2}, "choose ulysses_ring"),
        ("auto", {"tensor": 3}, "choose 1 or 2 or 4 or 5"),
        ("auto", {"ulysses_shards": 8, "heads": 12}, "choose 1 or 2 or 4"),
    ],
)
def test_what_cannot_run_is_refused_with_the_legal_values(name, given, words):
    with pytest.raises(UserError, match=words):
        parse(name, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scheme": "spiral"}, "local, ring, ulysses, ulysses_ring"),
        ({"kernel": "magic"}, "dot_product, chunked"),
        ({"ring": 0}, "1 or more"),
        ({"chunks": 0}, "1 or more"),
        ({"scheme": "ring", "ulysses": 2}, "choose ulysses_ring"),
        ({"scheme": "ulysses", "ring": 2}, "no ring"),
        ({"ring": 2}, "no ring"),
        ({"scheme": "ulysses", "ulysses": 8, "heads": 12}, "choose 1 or 2 or 4"),
        ({"heads": 12, "tensor": 8}, "choose 1 or 2 or 3 or 4 or 6 or 12"),
    ],
)
def test_the_constructor_checks(given, words):
    with pytest.raises(UserError, match=words):
        AttentionPlan(**given)


def test_every_kernel_has_a_platform_and_a_function():
    assert all(set(kernel.platforms) & {"cpu", "gpu", "tpu"} for kernel in KERNELS.values())
    assert all(callable(kernel.local()) for kernel in KERNELS.values())


def test_tokamax_is_asked_for_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="choose auto or one of dot_product, chunked, flash, splash, ring"):
        parse("tokamax_flash", platform="tpu")


def test_the_plan_needs_no_jax():
    code = (
        "import sys; from maxdiffusion.attention.plan import plans; plans('auto', heads=8); print('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
