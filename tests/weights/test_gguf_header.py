"""GGUF files that the format's own library wrote, and damaged ones."""

import struct

import gguf
import numpy as np
import pytest

from maxdiffusion.errors import UserError
from maxdiffusion.runtime import paths
from maxdiffusion.weights import sources
from maxdiffusion.weights.headers import read_header
from tests.support.bucket import bucket  # noqa: F401  a fixture
from tests.support.gguf_file import Kind, blocks, write

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16")
OTHERS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS")
OTHERS += ("IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4")


@pytest.fixture
def weight():
    return np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_strips(monkeypatch):
    monkeypatch.setattr(sources, "STRIP", 2 * 512 * 4)  # two rows


def read(tensor):
    return np.concatenate([np.float32(rows) for _, rows in sources.strips(tensor, 0, tensor.shape[0])])


@pytest.mark.parametrize("name", [*LEGACY, *OTHERS])
def test_numbers_are_those_of_the_library(weight, tmp_path, name):
    kind = Kind[name]
    data = gguf.quants.quantize(weight, kind) if name in LEGACY else blocks(kind, weight.shape)
    plain = np.arange(5, dtype=np.float32)
    write(
        tmp_path / "a.gguf", {"bias": (plain, Kind.F32), "weight": (data, kind), "half": (plain.astype("f2"), Kind.F16)}
    )
    tensors, metadata = read_header(tmp_path / "a.gguf")
    assert metadata["general.architecture"] == "wan"
    tensor = tensors["weight"]
    assert (tensor.shape, tensor.stored_as, tensor.nbytes) == (weight.shape, name, data.nbytes)
    np.testing.assert_array_equal(read(tensor), gguf.quants.dequantize(data, kind))
    for other in ("bias", "half"):
        np.testing.assert_array_equal(read(tensors[other]), plain)


def test_a_row_that_begins_within_a_block(weight, tmp_path):
    """As stored by writers that cut a tensor into lines of 256 numbers, whatever its own rows are."""
    weight = weight.reshape(16, 3, 4, 4, 4)[:, :, :, :2]  # 96 numbers in a row
    stored = gguf.quants.quantize(weight.reshape(-1, 256), Kind.Q8_0)
    shape = [int(size) for size in weight.shape]
    write(
        tmp_path / "a.gguf",
        {"conv.weight": (stored, Kind.Q8_0), "plain.weight": (np.float32(weight).reshape(16, 3, 32), Kind.F32)},
        add=lambda writer: [
            writer.add_array(f"comfy.gguf.orig_shape.{name}.weight", shape) for name in ("conv", "plain")
        ],
    )
    tensors, _ = read_header(tmp_path / "a.gguf")
    want = gguf.quants.dequantize(stored, Kind.Q8_0).reshape(weight.shape)
    for first in range(16):
        np.testing.assert_array_equal(tensors["conv.weight"].rows(first, first + 1), want[first : first + 1])
    np.testing.assert_array_equal(read(tensors["plain.weight"]), weight)


def test_five_axes(tmp_path):
    patch = np.arange(2 * 3 * 1 * 2 * 2, dtype=np.float32).reshape(2, 3, 1, 2, 2)
    write(tmp_path / "a.gguf", {"patch_embedding.weight": (patch, Kind.F32)})
    np.testing.assert_array_equal(read(read_header(tmp_path / "a.gguf")[0]["patch_embedding.weight"]), patch)


def test_a_file_in_a_bucket(weight, tmp_path, bucket):  # noqa: F811
    folder = tmp_path / "buckets" / "b"
    folder.mkdir(parents=True)
    write(folder / "a.gguf", {"weight": (gguf.quants.quantize(weight, Kind.Q8_0), Kind.Q8_0)})
    tensor = read_header(paths.parse("gs://b/a.gguf"))[0]["weight"]
    assert bucket.reads == 0  # ranges
    rows = tensor.rows(2, 5)
    assert bucket.reads == 1
    np.testing.assert_array_equal(rows, read(tensor)[2:5])


# ---- files that cannot be read


def header(version=3, tensors=1, values=b"", count=0, order="<"):
    return b"GGUF" + struct.pack(f"{order}IQQ", version, tensors, count) + values


def string(text):
    return struct.pack("<Q", len(text)) + text


def info(name=b"w", shape=(32,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def padded(*parts):
    head = b"".join(parts)
    return head + b"\0" * (-len(head) % 32)


F32 = padded(header(), info()) + b"\0" * 128
Q8_0 = padded(header(), info(kind=8))
FAULTS = {
    "version 1": (header(version=1), r"GGUF file of version 1; .*version 2 or 3 can be read"),
    "big endian": (header(order=">"), "GGUF file in big-endian order; little-endian"),
    "magic alone": (b"GGUF" + b"\0" * 4, "version 0"),
    "cut in the numbers": (header()[:12], r"\(12 bytes\) is a GGUF file that is cut off within its header"),
    "cut in an info": (header() + info()[:-1], "cut off within its header"),
    "many tensors": (header(tensors=2**60) + info(), "cut off within its header"),
    "a long name": (header() + struct.pack("<Q", 2**62), "cut off within its header"),
    "many axes": (header() + string(b"w") + struct.pack("<I", 2**32 - 1), "cut off within its header"),
    "truncated": (F32[:-1], r"truncated: it has \d+ bytes and its header asks for \d+"),
    "too long": (F32 + b"\0" * 33, "followed by unknown bytes"),
    "offset beyond the end": (padded(header(), info(offset=2**40)) + b"\0" * 128, "damaged.*w does not begin where"),
    "overlap": (
        padded(header(tensors=2), info(), info(b"v", offset=96)) + b"\0" * 256,
        "damaged.*v does not begin where the tensor before it ends",
    ),
    "twice": (padded(header(tensors=2), info(), info(offset=128)) + b"\0" * 256, "damaged.*w is stored twice"),
    "half a block": (padded(header(), info(shape=(48,), kind=8)) + b"\0" * 51, r"damaged.*no whole blocks of 32"),
    "no axes": (padded(header(), info(shape=(), kind=8)) + b"\0" * 34, r"damaged.*no whole blocks of 32"),
    "unknown quantisation": (padded(header(), info(kind=139)), r"'w' in the quantisation 139, which.*Q8_0, Q6_K"),
    "one for activations": (padded(header(), info(kind=9)) + b"\0" * 40, r"'w' in the quantisation 9, which"),
    "name is no text": (padded(header(), info(b"\xff")) + b"\0" * 128, "damaged.*UnicodeDecodeError"),
    "unknown type of value": (header(count=1, values=string(b"a") + struct.pack("<I", 77)), "damaged.*77"),
    "nested too deep": (
        header(count=1, values=string(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9999),
        "damaged.*[Rr]ecursion",
    ),
    "alignment of 0": (
        header(count=1, values=string(b"general.alignment") + struct.pack("<II", 4, 0)) + info(),
        "damaged.*ZeroDivision",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_file(tmp_path, fault):
    path, (content, message) = tmp_path / "a.gguf", FAULTS[fault]
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "architecture, add, message",
    [
        ("flux", lambda writer: None, r"architecture 'flux'; those of WAN \(wan\).*\(t5encoder\)"),
        ("wan", lambda writer: writer.add_uint16("split.count", 3), r"is part 1 of 3 of one GGUF.*gguf-split --merge"),
        ("wan", lambda writer: writer.add_string("split.count", "3"), r"damaged GGUF header"),
        (
            "wan",
            lambda writer: writer.add_array("comfy.gguf.orig_shape.w", [5, 7]),
            r"damaged.*original shape \(5, 7\)",
        ),
    ],
)
def test_metadata_that_cannot_be_meant(tmp_path, architecture, add, message):
    write(tmp_path / "a.gguf", {"w": (np.zeros(32, np.float32), Kind.F32)}, architecture, add)
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "a.gguf")


def test_a_scale_that_is_not_finite(weight, tmp_path):
    data = gguf.quants.quantize(weight, Kind.Q8_0)
    data[3, 34:36] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    write(tmp_path / "a.gguf", {"weight": (data, Kind.Q8_0)})
    tensor = read_header(tmp_path / "a.gguf")[0]["weight"]
    tensor.rows(0, 3)
    with pytest.raises(UserError, match=r"a\.gguf stores numbers in 'weight' that are not finite"):
        tensor.rows(3, 4)
