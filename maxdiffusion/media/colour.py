"""Decoded video frames -> 8-bit RGB as a BT.709 screen shows it: matrices, ranges, wide gamuts and HDR."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from jaxtyping import Float, UInt8

# libswscale's fast path, without these flags, makes all levels 1.0 to 1.4 darker.
ACCURATE = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
GAMMA = 2.4  # of an SDR screen (BT.1886)
WHITE = 203.0  # cd/m2 of diffuse white in HDR (BT.2408), the white of SDR
PEAK = 1000.0  # cd/m2, the nominal peak of HLG (BT.2100)
KNEE = 0.95  # of white: brighter light is compressed, so that white is 253 of 255 and highlights keep some shape

Light = Float[np.ndarray, "*n"]


def _pq(signal: Light) -> Light:
    """Displayed light of a PQ signal, 1 at diffuse white (BT.2100, table 4)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    root = signal ** (1 / m2)
    return (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1) * (10000 / WHITE)


def _hlg(signal: Light) -> Light:
    """Scene light of an HLG signal, 0..1 (BT.2100, table 5)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


class Transfer(NamedTuple):
    """A transfer function of HDR: signal 0..1 -> light, and whether that is the scene's, which a screen changes."""

    name: str
    light: Callable[[Light], Light]
    of_the_scene: bool = False


HDR: Mapping[int, Transfer] = {
    ColorTrc.SMPTE2084: Transfer("PQ", _pq),
    ColorTrc.ARIB_STD_B67: Transfer("HLG", _hlg, of_the_scene=True),
}


class Gamut(NamedTuple):
    """Chromaticities (x, y) of red, green and blue; white is D65."""

    name: str
    red: tuple[float, float]
    green: tuple[float, float]
    blue: tuple[float, float]

    def to_xyz(self) -> Float[np.ndarray, "3 3"]:
        """Linear RGB -> CIE XYZ, with Y = 1 for white."""
        columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in (self.red, self.green, self.blue)]).T
        return columns * np.linalg.solve(columns, [0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])


BT709 = Gamut("BT.709", (0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
BT2020 = Gamut("BT.2020", (0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
WIDE: Mapping[int, Gamut] = {
    ColorPrimaries.BT2020: BT2020,
    ColorPrimaries.SMPTE432: Gamut("Display P3", (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}


class Matrix(NamedTuple):
    """A matrix of YCbCr: its name, how libswscale is asked for it, and the weights of red and blue in Y."""

    name: str
    libswscale: int
    red: float
    blue: float


_BT601 = Matrix("BT.601", Colorspace.ITU601, 0.299, 0.114)
# As frames are marked (AVColorSpace).
_MATRICES: Mapping[int, Matrix] = {
    1: Matrix("BT.709", Colorspace.ITU709, 0.2126, 0.0722),
    4: Matrix("FCC", Colorspace.FCC, 0.30, 0.11),
    5: _BT601,
    6: _BT601,
    7: Matrix("SMPTE 240M", Colorspace.SMPTE240M, 0.212, 0.087),
    9: Matrix("BT.2020", Colorspace.BT2020, 0.2627, 0.0593),
}
_UNMARKED = 2


def to_rgb(frame: VideoFrame, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The frame's picture, resampled to a width in pixels.

    HDR is mapped to SDR: diffuse white becomes white, brighter light is compressed with its hue kept (BT.2408 and
    BT.2390 leave the curve open). Colours outside BT.709 are clipped.

    Raises:
      ValueError: its matrix is not one of those that libswscale converts.
    """
    hdr, gamut = HDR.get(frame.color_trc), _gamut(frame)
    if hdr is None and gamut is None:
        matrix = _matrix(frame).libswscale if _is_ycbcr(frame) else None
        return _converted(frame, width, "rgb24", matrix)
    light = _table(hdr)[np.rint(np.clip(_signal(frame, width), 0, 1) * 65535).astype(np.uint16)]
    if hdr is not None and hdr.of_the_scene:  # the system gamma of 1.2 at PEAK
        luminance = light @ (gamut or BT2020).to_xyz()[1].astype(np.float32)
        light *= (luminance**0.2 * np.float32(PEAK / WHITE))[..., None]
    if gamut is not None:
        light = np.maximum(light @ np.linalg.solve(BT709.to_xyz(), gamut.to_xyz()).T.astype(np.float32), 0)
    if hdr is not None:
        brightest = np.maximum(light.max(-1, keepdims=True), np.float32(1e-6))
        light *= _compressed(brightest) / brightest
    return np.rint(np.minimum(light, 1) ** np.float32(1 / GAMMA) * 255).astype(np.uint8)


def alpha(frame: VideoFrame, width: int) -> UInt8[np.ndarray, "h w"] | None:
    """Its opacity, resampled to a width in pixels; None where it has none."""
    if not any(component.is_alpha for component in frame.format.components):
        return None
    return _converted(frame, width, "rgba")[..., 3]


def describe(frame: VideoFrame) -> str:
    """The colours of a frame and what `to_rgb` makes of them, in words."""
    hdr, gamut = HDR.get(frame.color_trc), _gamut(frame)
    if hdr is not None:
        return f"{hdr.name} {(gamut or BT709).name}, mapped to SDR BT.709"
    if gamut is not None:
        return f"{gamut.name}, converted to BT.709"
    if _is_ycbcr(frame):
        words = f"{_matrix(frame).name}{', full range' if _is_full(frame) else ''}"
        return f"unmarked, read as {words}" if frame.colorspace == _UNMARKED else words
    return "RGB" if frame.format.is_rgb or frame.format.has_palette else "grey"


def _compressed(light: Light) -> Light:
    """Light 0.. to 0..1: itself up to KNEE, then approaching 1 with the same slope."""
    room = np.float32(1 - KNEE)
    return np.where(light <= KNEE, light, 1 - room * np.exp((KNEE - light) / room))


@functools.lru_cache(maxsize=4)
def _table(hdr: Transfer | None) -> Float[np.ndarray, 65536]:
    """Light of each 16-bit signal."""
    signal = np.arange(65536) / 65535
    return (signal**GAMMA if hdr is None else hdr.light(signal)).astype(np.float32)


def _gamut(frame: VideoFrame) -> Gamut | None:
    """Its gamut where that is wider than BT.709; unmarked HDR and frames of BT.2020's matrix have BT.2020."""
    if frame.color_primaries == _UNMARKED and (frame.color_trc in HDR or frame.colorspace == Colorspace.BT2020):
        return BT2020
    return WIDE.get(frame.color_primaries)


def _matrix(frame: VideoFrame) -> Matrix:
    """Its YCbCr matrix; of a frame that is unmarked as players choose it: by size, HDR has BT.2020."""
    marked = frame.colorspace
    if marked == _UNMARKED:
        tall = frame.height > 576 or frame.width >= 1280
        marked = 9 if frame.color_trc in HDR else 1 if tall else 6
    if marked not in _MATRICES:
        raise ValueError(f"its colours are stored by matrix {marked}, which is not converted; store it as BT.709")
    return _MATRICES[marked]


def _is_ycbcr(frame: VideoFrame) -> bool:
    return len(frame.format.components) >= 3 and not frame.format.is_rgb and not frame.format.has_palette


def _is_full(frame: VideoFrame) -> bool:
    return frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")


def _signal(frame: VideoFrame, width: int) -> Float[np.ndarray, "h w 3"]:
    """Its RGB signal, 0..1, not clipped; libswscale's own of 16 bits is 0.2 % too dark (measured, libswscale 9.5)."""
    if not _is_ycbcr(frame):
        return _converted(frame, width, "rgb48le").astype(np.float32) / 65535
    values = _converted(frame, width, "yuv444p16le").astype(np.float32) / 256  # on the scale of 8 bits
    highest = 256 - 2.0 ** (8 - frame.format.components[0].bits)
    black, room, rooms = (0, highest, highest) if _is_full(frame) else (16, 219, 224)
    luma, chroma = (values[..., 0] - black) / room, (values[..., 1:] - 128) / rooms
    _, _, red, blue = _matrix(frame)
    r, b = (luma + 2 * (1 - weight) * part for weight, part in ((red, chroma[..., 1]), (blue, chroma[..., 0])))
    return np.stack([r, (luma - red * r - blue * b) / (1 - red - blue), b], -1)


def _converted(frame: VideoFrame, width: int, form: str, matrix: int | None = None) -> np.ndarray:
    """The frame in another pixel format and width, by libswscale."""
    # One thread: PyAV keeps a pool of more for good, for which a process forked later waits.
    image = frame.reformat(width, format=form, src_colorspace=matrix, interpolation=ACCURATE, threads=1)
    return image.to_ndarray()
