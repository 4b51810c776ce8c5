"""Sources and what they compose: each loaded parameter against arithmetic done here."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from maxdiffusion.models.layers import parameter
from maxdiffusion.weights import loader, mapping, naming, sources
from maxdiffusion.weights.headers import read_header
from maxdiffusion.weights.rule import Rule, Transform
from maxdiffusion.weights.sources import plus, row_slice, scaled
from maxdiffusion.weights.tables import clip, dit, original
from tests.support.safetensors_file import write

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
SCALES = {
    "none": None,
    "per tensor": lambda rows: (),
    "per row": lambda rows: (rows,),
    "row x 1": lambda rows: (rows, 1),
}
RULES = {"DIT": dit.RULES, "CLIP": clip.RULES}

# Every fused module of every table: (table, its name, the diffusers names of its parts).
FUSED = [
    (table, theirs, ours)
    for table in ("DIT", "UMT5", "CLIP", "VAE")
    for theirs, ours in getattr(original, table).items()
    if not isinstance(ours, str)
]


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    monkeypatch.setattr(sources, "STRIP", 100)  # a few rows


def test_which_are_fused():
    assert {(table, theirs.split(".")[-1]) for table, theirs, _ in FUSED} == {("CLIP", "to_qkv"), ("DIT", "linear1_kv")}


class Leaves(nnx.Module):
    def __init__(self, shapes, dtype):
        for name, shape in shapes.items():
            setattr(self, name, parameter(shape, dtype))


def loaded(tensors, rules, shapes, dtype):
    net = Leaves(shapes, dtype)
    net = loader.materialize(net, mapping.match(tensors, rules, net, what="here"))
    return {name: np.asarray(getattr(net, name).get_value()) for name in shapes}


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("kind", [E4M3, E5M2])
@pytest.mark.parametrize("scaling", SCALES)
@pytest.mark.parametrize(("table", "theirs", "ours"), FUSED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parts_of_a_fused_tensor_take_their_own_scales(tmp_path, table, theirs, ours, scaling, kind, spelling, dtype):
    rng, module, width = np.random.default_rng(0), theirs.format(i=3), 24
    rows = len(ours) * width
    codes = (rng.standard_normal((rows, 16)) * 20).astype(kind)
    bias = rng.standard_normal(rows).astype(np.float32)
    file, want = {f"{module}.weight": codes, f"{module}.bias": bias}, codes.astype(np.float32)
    if SCALES[scaling]:
        shape = SCALES[scaling](rows)
        scale = rng.uniform(0.01, 3, shape).astype(np.float32)
        file[f"{module}.{spelling}"] = scale
        want = want * np.broadcast_to(scale.reshape(-1, 1), (rows, 1))
    write(tmp_path / "a.safetensors", file)
    names = [target.format(i=3) for target in ours]
    rules, shapes = [], {}
    for i, name in enumerate(names):
        (weight,) = (rule for rule in RULES[table] if rule.source.format(layer=3, i=3) == f"{name}.weight")
        assert weight.transform is Transform.LINEAR
        rules += [Rule(f"{name}.weight", f"w{i}", weight.transform), Rule(f"{name}.bias", f"b{i}")]
        shapes |= {f"w{i}": (16, width), f"b{i}": (width,)}
    tensors = naming.normalised(read_header(tmp_path / "a.safetensors")[0], getattr(original, table))
    got = loaded(tensors, rules, shapes, dtype)
    for i in range(len(names)):
        part = slice(i * width, (i + 1) * width)
        np.testing.assert_array_equal(got[f"w{i}"], want[part].T.astype(dtype))
        np.testing.assert_array_equal(got[f"b{i}"], bias[part].astype(dtype))
    assert sum(tensor.nbytes for tensor in tensors.values()) == codes.nbytes + bias.nbytes


@pytest.mark.parametrize("scaling", SCALES)
@pytest.mark.parametrize("reshape", [False, True])
@pytest.mark.parametrize("transform", Transform)
def test_scales_of_rows_are_those_of_torchs_axis(tmp_path, transform, reshape, scaling):
    rng, shape = np.random.default_rng(0), (6, 5, 1, 2, 4)[: len(transform.value or (0, 1))]
    codes = (rng.standard_normal(shape) * 20).astype(E4M3)
    want, file = codes.astype(np.float32), {"head.head.weight": codes}
    if SCALES[scaling]:
        scale = rng.uniform(0.01, 3, SCALES[scaling](6)).astype(np.float32)
        file["head.head.scale_weight"] = scale
        want = want * scale.reshape(-1, *(1 for _ in shape[1:])) if scale.ndim else want * scale
    write(tmp_path / "a.safetensors", file)
    want = want.transpose(transform.value or range(want.ndim))
    want = want.reshape(-1) if reshape else want
    tensors = naming.normalised(read_header(tmp_path / "a.safetensors")[0], original.DIT)
    rules = [Rule("proj_out.weight", "w", transform, reshape=reshape)]
    np.testing.assert_array_equal(loaded(tensors, rules, {"w": want.shape}, jnp.float32)["w"], want)


# ---- what a file holds and what is added to it


def product(up, down):
    """Up @ down in fp32, as a low-rank update of a weight would be: a source of another module."""

    def rows(start, stop):
        return up.rows(start, stop).astype(np.float32) @ down.rows(0, down.shape[0]).astype(np.float32)

    shape = (up.shape[0], down.shape[1])
    return dataclasses.replace(up, dtype="F32", shape=shape, nbytes=up.nbytes + down.nbytes, rows=rows)


@pytest.fixture
def numbers():
    rng = np.random.default_rng(1)
    return {
        "fp8": (rng.standard_normal((36, 16)) * 20).astype(E4M3),
        "scale": rng.uniform(0.01, 3, 36).astype(np.float32),
        "half": rng.standard_normal((36, 16)).astype(ml_dtypes.bfloat16),
        "up": rng.standard_normal((36, 2)).astype(np.float16),
        "down": rng.standard_normal((2, 16)).astype(np.float16),
        "one": np.array(3, np.float16),
    }


@pytest.fixture
def tensors(numbers, tmp_path):
    write(tmp_path / "a.safetensors", numbers)
    return read_header(tmp_path / "a.safetensors")[0]


def test_rows_of_every_kind_of_source(numbers, tensors):
    wide = {name: array.astype(np.float32) for name, array in numbers.items()}
    weight, change = scaled(tensors["fp8"], tensors["scale"]), product(tensors["up"], tensors["down"])
    values, update = wide["fp8"] * wide["scale"][:, None], wide["up"] @ wide["down"]
    cases = [
        (tensors["half"], numbers["half"]),
        (weight, values),
        (row_slice(weight, 12, 12), values[12:24]),
        (row_slice(row_slice(weight, 12, 24), 6, 6), values[18:24]),
        (plus(tensors["half"], change), wide["half"] + update),
        (plus(weight, change), values + update),
        (row_slice(plus(weight, change), 24, 12), (values + update)[24:]),
        (plus(row_slice(weight, 24, 12), row_slice(change, 24, 12)), (values + update)[24:]),
        (plus(plus(weight, change), tensors["half"]), values + update + wide["half"]),
    ]
    for source, want in cases:
        assert source.shape == want.shape and sources.FLOATS[source.dtype] == str(want.dtype)
        np.testing.assert_allclose(source.rows(0, len(want)), want, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(source.rows(2, 5), want[2:5], rtol=1e-6, atol=1e-6)
        parts = list(sources.strips(source, 1, len(want)))
        assert len(parts) > 3 and [first for first, _ in parts] == sorted({first for first, _ in parts})
        np.testing.assert_allclose(np.concatenate([rows for _, rows in parts]), want[1:], rtol=1e-6, atol=1e-6)
    assert tensors["one"].rows(0, 1).tolist() == [3]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sum_is_cast_once_at_the_end(numbers, tensors, dtype):
    """In bf16 the update alone would vanish beside the weight."""
    source = plus(scaled(tensors["fp8"], tensors["scale"]), scaled(tensors["fp8"]))
    want = numbers["fp8"].astype(np.float32) * numbers["scale"][:, None] + numbers["fp8"].astype(np.float32)
    parts = {f"w{i}.weight": row_slice(source, 12 * i, 12) for i in range(3)}
    rules = [Rule(f"w{i}.weight", f"w{i}", Transform.LINEAR) for i in range(3)]
    got = loaded(parts, rules, {f"w{i}": (16, 12) for i in range(3)}, dtype)
    for i in range(3):
        np.testing.assert_array_equal(got[f"w{i}"], want[12 * i : 12 * i + 12].T.astype(dtype))


def test_a_delta_of_another_shape_is_refused(tensors):
    with pytest.raises(ValueError, match="shape"):
        plus(tensors["half"], tensors["up"])
