"""Steps of the official models compiled for TPUs that are not there: what they communicate, what they need."""

import re
from collections import Counter

import pytest

from maxdiffusion.hardware.chips import slice_of
from tests.support.tpu_compiler import ROOT, needs_libtpu, script

pytestmark = needs_libtpu

SHARDED = "logical_axis_rules=[[embed,[fsdp,context]]]"


def peak(topology, *words, model="14b", page=None):
    """GiB of each program, checked against what the device has."""
    page = page or ROOT / "configs" / f"wan2.1_t2v_{model}.yml"
    printed = script(topology, str(page), *words)
    print(topology, page.relative_to(ROOT), *words, printed, sep="\n")
    found = {name: float(gib) for name, gib in re.findall(r"^(\w+) +([\d.]+) GiB", printed, re.M)}
    assert found and all(gib < slice_of(topology).generation.gib for gib in found.values()), printed
    return found


def test_weights_over_the_context_are_gathered_layer_by_layer(tmp_path):
    """A small picture and dense attention, so that the program compiles in seconds."""
    hlo = tmp_path / "step.txt"
    words = ("size=256*256", "num_frames=5", "guidance_scale=1", "attention=dot_product", SHARDED)
    peak("v6e:2x4", *words, "--layers", "3", "--programs", "step", "--hlo", str(hlo), model="1.3b")
    bodies = [part for part in hlo.read_text().split("\n\n") if "while/body" in part]
    loop = max(bodies, key=len)
    gathered = re.findall(r"= bf16\[([\d,]+)\]\S* all-gather\(", loop)
    weights = Counter(shape.removeprefix("1,") for shape in gathered)
    # One layer of each; the other two are the keys and values of attention=dot_product.
    assert weights["1536,1536"] == 6 and weights["1536,8960"] == 1 and weights["8960,1536"] == 1
    assert sum(weights.values()) <= 10 and not re.search(r" (all-reduce|collective-permute)(-start)?\(", loop)


@pytest.mark.parametrize(
    ("topology", "rules", "most"),
    [
        pytest.param("v6e:2x4", (), 0.7, marks=pytest.mark.slow),
        pytest.param("v6e:2x4", (SHARDED,), 0.3, marks=pytest.mark.slow),
        pytest.param("TPU7x:2x2x1", (), 0.7, marks=pytest.mark.slow),
        ("TPU7x:2x2x1", (SHARDED,), 0.3),
    ],
    ids=["v6e replicated", "v6e sharded", "TPU7x replicated", "TPU7x sharded"],
)
def test_no_step_begins_with_a_copy_of_the_weights(topology, rules, most):
    """0.63 GiB of weights; what the tokens of a small picture need beside them is next to nothing."""
    words = ("size=256*256", "num_frames=5", "guidance_scale=1", "attention=dot_product", *rules, "--layers", "6")
    assert peak(topology, *words, "--programs", "step", model="1.3b")["step"] < most


@pytest.mark.slow
@pytest.mark.parametrize("rules", [(), (SHARDED,)], ids=["replicated", "sharded"])
def test_a_guided_step_of_the_14b_model_fits_v6e_8(rules):
    words = ("attention=ulysses_ring", "ulysses_shards=4", "ici_data_parallelism=1", "ici_context_parallelism=8")
    peak("v6e:2x4", *words, *rules, "--programs", "step")


@pytest.mark.slow
@pytest.mark.parametrize("rules", [(), (SHARDED,)], ids=["replicated", "sharded"])
def test_a_guided_step_of_the_14b_model_fits_tpu7x_8(rules):
    words = ("attention=ulysses_ring", "ulysses_shards=2", "ici_data_parallelism=2", "guidance_mode=batched")
    peak("TPU7x:2x2x1", *words, *rules, "--programs", "step")


# `dot_product` is not among them: its logits alone would be 57 GB a device.
MODES = {
    "flash": ("attention=flash",),
    "tokamax_flash": ("attention=tokamax_flash",),
    "ring": ("attention=ring",),
    "tokamax_ring": ("attention=tokamax_ring",),
    "ulysses": ("attention=ulysses", "ici_data_parallelism=2", "guidance_scale=5", "guidance_mode=batched"),
    "ulysses_ring U8": ("attention=ulysses_ring", "ulysses_shards=8"),
    "ulysses_ring U4": ("attention=ulysses_ring", "ulysses_shards=4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", ["1280*720", "832*480"])  # 75,600 and 32,760 tokens
@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4", "v5p:2x2x4", "TPU7x:2x2x2"])
def test_one_block_of_the_14b_model_on_16_devices(topology, size, mode):
    words = ("guidance_scale=1", "ici_data_parallelism=1") if mode != "ulysses" else ()
    peak(topology, f"size={size}", *words, *MODES[mode], "--layers", "1", "--programs", "step")


GIVEN = {
    "_i2v_": ("image=a", "width=1280", "height=720"),
    "_flf2v_": ("image=a", "last_image=a", "width=1280", "height=720"),
    "_animate_": ("image=a", "pose_video=.", "face_video=.", "num_frames=77", "width=1280", "height=720"),
    "_animate2_": ("image=a", "driving_video=.", "num_frames=81", "width=640", "height=800"),
    "_s2v_": ("image=a", "audio=a", "num_frames=77", "width=1024", "height=704"),
    "_480p": ("width=832", "height=480"),
}
PAGES = sorted(path.stem for path in (ROOT / "configs").glob("wan2*.yml"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("folder", "topology"), [("v6e-8", "v6e:2x4"), ("v7x-8", "TPU7x:2x2x1")])
def test_the_step_of_every_page_fits_eight_devices(folder, topology, page):
    """By the machine's own page where there is one. `-s` prints what the README's table says."""
    own = ROOT / "configs" / folder / f"{page}.yml"
    given: dict[str, str] = {}
    for kind, words in GIVEN.items():
        given |= {word.split("=")[0]: word for word in words if kind in page}
    peak(topology, *given.values(), "--programs", "step", page=own if own.exists() else own.parents[1] / own.name)
