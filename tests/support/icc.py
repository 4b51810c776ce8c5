"""ICC profiles, version 2, made of their definitions: primaries and a gamma, a grey gamma, or a table of inks."""

from __future__ import annotations

import struct

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])
D65 = np.array([0.95047, 1.0, 1.08883])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))


def to_xyz(primaries, white=D65):
    """The matrix from linear RGB of these primaries to XYZ at D50 (columns: red, green, blue)."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    matrix = columns * np.linalg.solve(columns, white)
    cone = np.diag((_BRADFORD @ D50) / (_BRADFORD @ white))
    return np.linalg.inv(_BRADFORD) @ cone @ _BRADFORD @ matrix


def srgb_of(xyz):
    """8-bit sRGB of XYZ at D50, clipped."""
    linear = np.clip(np.linalg.solve(to_xyz(SRGB), xyz), 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


def lab_of(srgb):
    """CIELAB at D50 of 8-bit sRGB."""
    value = np.asarray(srgb) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(to_xyz(SRGB) @ linear / D50)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def rgb(primaries, gamma, name="test RGB", white=D65):
    """A profile of RGB primaries, relative to that white."""
    columns = to_xyz(primaries, white).T
    tags = {tag: _xyz(column) for tag, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
    return _profile(b"RGB ", b"XYZ ", name, tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _gamma(gamma)))


def grey(gamma, name="test grey"):
    """A profile of grey."""
    return _profile(b"GRAY", b"XYZ ", name, {b"kTRC": _gamma(gamma)})


def cmyk(colours, name="test inks"):
    """A profile of four inks: `colours` maps (c, m, y, k), each 0 or 1, to 8-bit sRGB; black elsewhere."""
    table = []
    for corner in np.ndindex(2, 2, 2, 2):
        lightness, a, b = lab_of(colours.get(corner, (0, 0, 0)))
        table += np.clip(np.rint([lightness * 2.55, a + 128, b + 128]), 0, 255).astype(int).tolist()
    ramp = bytes(range(256))
    unit = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + unit + ramp * 4 + bytes(table) + ramp * 3
    return _profile(b"CMYK", b"Lab ", name, {b"A2B0": lut}, kind=b"prtr")


def _xyz(value):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(part * 65536) for part in value))


def _gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def _profile(space, connection, name, tags, kind=b"mntr"):
    text = name.encode() + b"\0"
    about = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {b"desc": about, b"wtpt": _xyz(D50), b"cprt": b"text\0\0\0\0none\0", **tags}
    offset, index, content = 132 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        index += tag + struct.pack(">II", offset + len(content), len(data))
        content += data
    header = b"\0\0\0\0lcms\x02\x20\0\0" + kind + space + connection + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    header += b"acsp" + bytes(28) + struct.pack(">3i", *(round(part * 65536) for part in D50))
    body = struct.pack(">I", len(tags)) + index + content
    return struct.pack(">I", 128 + len(body)) + header[4:].ljust(124, b"\0") + body
