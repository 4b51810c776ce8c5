"""What a config leaves open is chosen once, and what it gives stays."""

import dataclasses
import itertools
import logging

import jax
import pytest

from maxdiffusion import request
from maxdiffusion.errors import UserError
from maxdiffusion.request import cost
from maxdiffusion.request.layout import lay_out
from maxdiffusion.request.nets import read_configs
from maxdiffusion.request.session import recipe_of

A14B, SCALES = "model_name=wan2.2-t2v-a14b", ("guidance_scale", "guidance_scale_2")


@pytest.fixture
def place(tmp_path):
    (tmp_path / "case.yml").write_text(
        f"model_name: wan2.1-t2v-14b\nprompt: x\noutput_dir: {tmp_path}\nactivations_dtype: float32\n"
    )

    def place(*words, devices=None):
        job = request.load([str(tmp_path / "case.yml"), *words])
        plan, placement = lay_out(job, recipe_of(job), read_configs(job), devices)
        assert (plan.ring, plan.ulysses) == (placement.mesh.shape["ring"], placement.mesh.shape["ulysses"]) or (
            plan.scheme == "local"
        )
        return plan, {axis: size for axis, size in placement.mesh.shape.items() if size > 1}

    return place


@pytest.mark.parametrize(
    ("words", "want"),
    [
        ((), {"ulysses": 8}),
        (("ulysses_shards=auto", "attention=ulysses_ring"), {"ulysses": 8}),
        (("guidance_scale=1",), {"ulysses": 8}),
        (("guidance_mode=two_pass",), {"ulysses": 8}),
        (("ici_data_parallelism=1",), {"ulysses": 8}),
        (("ici_context_parallelism=8",), {"ulysses": 8}),
        (("ici_data_parallelism=4",), {"data": 4, "ulysses": 2}),
        (("ici_tensor_parallelism=2",), {"ulysses": 4, "tensor": 2}),
        (("ici_fsdp_parallelism=8",), {"fsdp": 8}),
        (("ulysses_shards=2", "attention=ulysses_ring"), {"ring": 4, "ulysses": 2}),
        (("ulysses_attention_chunks=5", "ulysses_shards=8", "attention=ulysses_ring"), {"ulysses": 8}),
        (("attention=ulysses",), {"ulysses": 8}),
        (("attention=ring",), {"ring": 8}),
        (("attention=ring", "ring_direction=two_way"), {"ring": 8}),
        (("ring_size=4", "ulysses_size=2", "attention=ulysses_ring"), {"ring": 4, "ulysses": 2}),
    ],
)
def test_degrees(place, words, want):
    plan, got = place(*words)
    assert got == want
    chunks = [word for word in words if word.startswith("ulysses_attention_chunks")]
    assert plan.chunks == (5 if chunks else 1)
    assert plan.ring_direction == ("two_way" if "ring_direction=two_way" in words else "one_way")


def test_options_reach_the_plan(place, caplog):
    with caplog.at_level(logging.INFO):
        plan, got = place(devices=jax.devices()[:1])
    assert got == {} and plan.scheme == "local" and plan.kernel == "chunked"
    assert "attention=auto: kernel chunked, the fastest exact one for float32 here" in caplog.text
    assert "ulysses_shards" not in caplog.text
    with pytest.raises(UserError, match="use_base2_exp=True is not used by the attention kernel chunked"):
        place("use_base2_exp=true")


def test_an_odd_number_of_devices_leaves_the_pair_in_one_batch(place):
    assert place(devices=jax.devices()[:5])[1] == {"ulysses": 5}


@pytest.mark.parametrize("link", [1e7, 1e10])
def test_where_links_are_slow_the_pair_splits(place, link, monkeypatch):
    """Otherwise the VAE is faster with all devices on the context axis."""
    monkeypatch.setattr(cost, "SPEEDS", {"cpu": dataclasses.replace(cost.SPEEDS["cpu"], link=link)})
    assert place()[1] == ({"data": 2, "ring": 4} if link < 1e10 else {"ulysses": 8})


def test_the_pair_splits_where_a_step_has_one(place, monkeypatch):
    """An expert of scale 1 has no pair: devices of its own for the other branch would stand idle."""
    monkeypatch.setattr(cost, "SPEEDS", {"cpu": dataclasses.replace(cost.SPEEDS["cpu"], link=1e7)})
    pairs = {
        scales: place(A14B, *(f"{key}={scale}" for key, scale in zip(SCALES, scales, strict=True)))[1].get("data")
        for scales in itertools.product((1, 3), repeat=2)
    }
    assert pairs[1, 1] is None and pairs[3, 3] == 2


def test_nothing_legal_says_why(place):
    with pytest.raises(UserError, match="cannot split 40 heads"):
        place("attention=ulysses", devices=jax.devices()[:7])
