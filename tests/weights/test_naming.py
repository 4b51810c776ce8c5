"""The official repositories' names and the scales of fp8 and int8: headers only, except where numbers are compared."""

import gzip
import json
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.numpy import save_file

from maxdiffusion import variants
from maxdiffusion.attention.plan import AttentionPlan
from maxdiffusion.errors import UserError
from maxdiffusion.weights import dimensions, mapping, naming
from maxdiffusion.weights.checkpoint import NETS
from maxdiffusion.weights.headers import read_header
from maxdiffusion.weights.nets import builders
from maxdiffusion.weights.sources import scaled, stored, strips
from maxdiffusion.weights.tables import original
from tests.support.safetensors_file import original_name, write

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"
OF_ORIGINAL_NAMES = {"wan2.2-s2v-14b", "wan2.2-animate2-14b"}  # which test_nets matches
TRANSFORMERS = sorted(
    {path.name.removesuffix(".json.gz") for path in MANIFESTS.glob("wan*b.json.gz")} - OF_ORIGINAL_NAMES
)
# Transformers whose names are all among those of other ones.
LIKE_OTHERS = {
    name
    for name in TRANSFORMERS
    if name.split("-", 1)[1] in ("t2v-14b", "t2v-a14b", "i2v-a14b", "ti2v-5b", "vace-14b", "i2v-14b")
}
TABLES = {
    **dict.fromkeys(TRANSFORMERS, original.DIT),
    "umt5-xxl-encoder": original.UMT5,
    "clip-vit-h-14": original.CLIP,
    "wan2.1-vae": original.VAE21,
    "wan2.2-vae": original.VAE22,
}
UNIONS = {"wan2.1-vae": original.VAE, "wan2.2-vae": original.VAE}  # what is read with
# diffusers' single-file loader has no position embedding of two images, no encoders of text and image, no 2.2 VAE.
UNKNOWN_TO_THE_REFERENCE = ("wan2.1-flf2v-14b", "umt5-xxl-encoder", "clip-vit-h-14", "wan2.2-vae")
# The same in both namings: (module or tensor) of all nets.
SHARED = r"(vace_|pose_)?patch_embedding\..*|face_encoder\.(norm\d|out_proj|padding_tokens).*"


def manifest(name):
    shapes = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    shapes.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight, which the original stores once
    return {key: tuple(shape) for key, shape in shapes.items()}


def infos(shapes, dtype="F32"):
    result, start = {}, 0
    for name, shape in shapes.items():
        result[name] = stored(name, dtype, tuple(shape), Path("x"), start)
        start += result[name].nbytes
    return result


def to_original(shapes, table):
    """The parts of one tensor are joined."""
    result = {}
    for name, shape in shapes.items():
        theirs, parts = original_name(name, table)
        assert theirs != name or re.fullmatch(SHARED, name), f"{name} has no original name"
        if parts > 1:
            shape = (parts * shape[0], *shape[1:])
            assert result.get(theirs, shape) == shape
        else:
            assert theirs not in result
        result[theirs] = shape
    return result


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LIKE_OTHERS else n for n in TABLES])
def test_every_official_tensor_has_one_original_name_and_comes_back(name):
    shapes, table = manifest(name), TABLES[name]
    theirs = infos(to_original(shapes, table))
    table = UNIONS.get(name, table)
    back = naming.normalised({"model.diffusion_model." + key: tensor for key, tensor in theirs.items()}, table)
    assert {key: tensor.shape for key, tensor in back.items()} == shapes
    covered = sorted((each.start, each.start + each.nbytes) for each in back.values())  # every byte is used once
    assert [end for _, end in covered][:-1] == [start for start, _ in covered][1:]
    assert naming.is_original(back)
    assert naming.normalised(infos(shapes), table) == infos(shapes)
    assert not naming.is_original(infos(shapes))


@pytest.mark.parametrize("name", [name for name in TABLES if name not in UNKNOWN_TO_THE_REFERENCE])
def test_names_are_those_of_the_reference_converter(name):
    shapes = manifest(name)
    theirs = {key: torch.empty(shape, device="meta") for key, shape in to_original(shapes, TABLES[name]).items()}
    if "vae" in name:
        converted = single_file_utils.convert_wan_vae_to_diffusers(theirs)
    else:
        for key in [key for key in theirs if "net_app.convs" in key and key.endswith("bias")]:
            theirs[key] = theirs[key].reshape(1, -1, 1, 1)  # as the official file has them
        converted = single_file_utils.convert_wan_transformer_to_diffusers(theirs)
    assert {key: tuple(tensor.shape) for key, tensor in converted.items()} == shapes


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_an_original_file_alone_builds_and_fills_its_transformer(name):
    """No config.json: the size comes from the tensors, and it is the variant's; nothing is allocated."""
    theirs = to_original(manifest(name), original.DIT)
    for key, shape in theirs.items():
        if "net_app.convs" in key and key.endswith("bias"):
            theirs[key] = (1, *shape, 1, 1)  # as the official file of Animate has them
    blurs = {f"motion_encoder.enc.net_app.convs.1.{part}.0.kernel": (4, 4) for part in ("conv2", "skip")}
    tensors = naming.normalised(infos(theirs | blurs if "animate" in name else theirs), original.DIT)
    raw = dimensions.transformer_config({key: tensor.shape for key, tensor in tensors.items()}, {}, name)
    spec = next(spec for spec in variants.VARIANTS.values() if spec.name.startswith(name))
    variants.check(spec, raw)
    net = NETS["transformer"]
    build = builders(AttentionPlan(), weights_dtype="bfloat16", dtype="bfloat16")["transformer"]
    abstract = build(net.parse(raw))
    found = mapping.match(tensors, net.rules, abstract, what=name, ignored=net.ignored)
    assert sum(map(len, found.values())) == len(manifest(name))


def test_two_names_of_one_tensor():
    both = infos({"head.head.weight": (4, 8), "proj_out.weight": (4, 8)})
    with pytest.raises(UserError, match=r"'proj_out\.weight' and 'head\.head\.weight', which are two names"):
        naming.normalised(both, original.DIT)


# ---- fp8

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
Q = "blocks.0.self_attn.q"


@pytest.fixture
def weight():
    """8 x 6, every row different, among them the largest number and a subnormal one."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 6)).astype(np.float32) * 20
    weight[0, :2] = 448, 2**-9
    return weight


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    monkeypatch.setattr("maxdiffusion.weights.sources.STRIP", 52)


def read(path, dtype=np.float32):
    """What the loader makes of the file's only weight."""
    (tensor,) = naming.normalised(read_header(path)[0], original.DIT).values()
    return np.concatenate([numbers.astype(dtype) for _, numbers in strips(tensor, 0, tensor.shape[0])])


def note(**content):
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("kind", [E4M3, E5M2, np.int8])
@pytest.mark.parametrize("shape", [(), (1,), (8,), (8, 1)])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module."])
def test_scaled(weight, tmp_path, kind, shape, spelling, prefix):
    scale = (np.float32(0.03) + np.arange(math.prod(shape), dtype=np.float32)).reshape(shape)
    file = {f"{Q}.weight": weight.astype(kind), f"{Q}.{spelling}": scale}
    if kind != np.int8 and spelling == "scale_weight":
        file |= {"scaled_fp8": np.zeros(2, kind), f"{Q}.scale_input": np.ones((), "f4")}
    else:
        file |= {f"{Q}.comfy_quant": note(format="int8_tensorwise")}
    write(tmp_path / "a.safetensors", {prefix + name: array for name, array in file.items()})
    want = torch.from_numpy(weight.astype(kind).astype(np.float32)) * torch.from_numpy(
        scale.reshape(-1, 1) if scale.size > 1 else scale
    )
    np.testing.assert_array_equal(read(tmp_path / "a.safetensors"), want.numpy())


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_fp8_without_scales_is_cast(weight, tmp_path, kind):
    write(tmp_path / "a.safetensors", {f"{Q}.weight": weight.astype(kind)})
    np.testing.assert_array_equal(read(tmp_path / "a.safetensors"), weight.astype(kind).astype(np.float32))


def test_every_byte_of_fp8_means_what_torch_says(tmp_path):
    codes, file = torch.arange(256, dtype=torch.uint8), tmp_path / "bytes"
    file.write_bytes(bytes(range(256)))
    for name, kind in {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}.items():
        got = scaled(stored("w", name, (256,), file, 0)).rows(0, 256)
        np.testing.assert_array_equal(got, codes.view(kind).float().numpy())


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"scaled_fp8": np.zeros(2, E4M3)}, r"1 tensors in F8_E4M3 without their scales.*self_attn\.q"),
        ({f"{Q}.scale_weight": np.ones((2, 3), "f4")}, r"by F32\[2, 3\]; one number for the tensor or for each row"),
        ({f"{Q}.scale_weight": np.ones((), np.int32)}, r"by I32\[\]"),
    ],
)
def test_scales_that_cannot_be_meant(weight, tmp_path, broken, message):
    write(tmp_path / "a.safetensors", {f"{Q}.weight": weight.astype(E4M3), **broken})
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "beside, message",
    [
        ({}, r"1 tensors in I8 without their scales, such as 'blocks\.0\.self_attn\.q\.weight'"),
        ({"weight_scale": np.ones((2, 3), "f4")}, r"by F32\[2, 3\]"),
        (
            {"comfy_quant": note(format="int8_tensorwise", convrot=True)},
            r"'blocks.*\.q' as int8.* rotated.*can be read",
        ),
        ({"comfy_quant": note(format="convrot_w4a4")}, r"'blocks.*\.q' as convrot_w4a4; float8_e4m3fn, "),
        ({"comfy_quant": note()[:1]}, r"damaged blocks\.0\.self_attn\.q\.comfy_quant"),
        ({"comfy_quant": np.frombuffer(b"[1]", np.uint8)}, r"'blocks.*\.q' as \[1\]"),
    ],
)
def test_int8_that_cannot_be_meant(weight, tmp_path, beside, message):
    beside = {"weight_scale": np.ones((), "f4"), **beside} if beside else {}
    file = {f"{Q}.weight": weight.astype(np.int8), **{f"{Q}.{name}": array for name, array in beside.items()}}
    write(tmp_path / "a.safetensors", file)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "notes, message",
    [
        (
            {"layers": {Q: {"format": "int8_tensorwise", "convrot": True}}},
            r"self_attn\.q' as int8_tensorwise with rotated",
        ),
        ({"layers": {Q: {"format": "nvfp4"}}}, r"self_attn\.q' as nvfp4"),
        ([], r"damaged _quantization_metadata"),
    ],
)
def test_notes_in_the_header(tmp_path, notes, message):
    path = tmp_path / "a.safetensors"
    save_file({"w": np.zeros(2, np.float32)}, path, {"_quantization_metadata": json.dumps(notes)})
    with pytest.raises(UserError, match=message):
        read_header(path)
    save_file(
        {"w": np.zeros(2, np.float32)},
        path,
        {"_quantization_metadata": '{"layers": {"w": {"format": "int8_tensorwise"}}}'},
    )
    read_header(path)


@pytest.mark.parametrize("kind", [E4M3, np.int8])
def test_a_scale_that_is_not_finite(weight, tmp_path, kind):
    write(
        tmp_path / "a.safetensors", {f"{Q}.weight": weight.astype(kind), f"{Q}.weight_scale": np.float32(np.nan)[None]}
    )
    with pytest.raises(UserError, match=r"stores a scale in 'blocks.*weight_scale' that is not finite"):
        read(tmp_path / "a.safetensors")


def test_what_belongs_to_no_weight_is_left_for_the_match():
    tensors = infos({f"{Q}.scale_weight": (), f"{Q}.scale_input": (), "head.head.bias": (8,), "scale_weight": ()})
    assert set(naming.normalised(tensors, original.DIT)) == {
        f"{Q}.scale_weight",
        f"{Q}.scale_input",
        "scale_weight",
        "proj_out.bias",
    }


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_scale_of_a_weight_that_is_not_quantised(weight, tmp_path, kind):
    scale = np.arange(8, dtype=np.float32)
    write(tmp_path / "a.safetensors", {f"{Q}.weight": weight.astype(kind), f"{Q}.scale_weight": scale})
    want = weight.astype(kind).astype(np.float32) * scale[:, None]
    np.testing.assert_array_equal(read(tmp_path / "a.safetensors"), want)
