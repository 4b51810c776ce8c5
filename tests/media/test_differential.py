"""Files of many kinds, read by this package and by another ffmpeg: the same pictures at the same times."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from maxdiffusion.media.read import read_clip, stored_times, times
from tests.support.ffmpeg import decode, encode, ffmpeg

HEIGHT, WIDTH, COUNT, FPS = 48, 64, 18, 10
LEVELS = 2


@dataclass(frozen=True)
class Case:
    """A file to write, and how the other reader is told to read it.

    Attributes:
      name: of the file, with its suffix.
      words: for ffmpeg, which writes it.
      rate: stored frames per second.
      size: height and width.
      colour: filter of the other reader.
      shown: height and width as shown.
      rotate: degrees by which the container says that it is to be turned.
      form: pixel format of the other reader: RGB, or linear light in BT.2020, 1 at diffuse white.
    """

    name: str
    words: str
    rate: object = 20
    size: tuple[int, int] = (HEIGHT, WIDTH)
    colour: str = "scale=flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
    shown: tuple[int, int] = (HEIGHT, WIDTH)
    rotate: int = 0
    form: str = "rgb24"


def scaled(matrix: str, size: str = "") -> str:
    return f"scale={size}in_color_matrix={matrix}:flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"


def stored(suffix: str, codec: str, *formats: str) -> list[Case]:
    """The same frames in several pixel formats."""
    return [Case(f"{codec.split()[0]}-{form}.{suffix}", f"-c:v {codec} -pix_fmt {form}") for form in formats]


X264, X265 = "libx264 -crf 4 -bf 2", "libx265 -x265-params log-level=none:crf=4:pools=1"
FORMATS = [
    *stored("mp4", X264, "yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuvj420p"),
    *stored("mp4", "libx264rgb -crf 4", "rgb24"),
    *stored("mp4", X265, "yuv420p", "yuv420p10le", "yuv444p12le"),
    *stored("webm", "libvpx-vp9 -crf 4 -b:v 0 -cpu-used 8", "yuv420p", "yuv444p", "yuv420p10le"),
    *stored("mkv", "libaom-av1 -crf 4 -cpu-used 8", "yuv420p"),
    *stored("mov", "prores_ks", "yuv422p10le", "yuva444p10le"),
    *stored("mov", "qtrle", "rgb24", "argb"),
    *stored("mov", "png", "rgb24", "rgba", "rgb48be"),
    *stored("avi", "mjpeg -q:v 1", "yuvj422p"),
    *stored("avi", "huffyuv", "yuv422p"),
    *stored("mkv", "ffv1", "yuv420p", "yuv422p16le", "gbrp", "gbrp10le", "gray", "gray10le", "yuva420p", "bgra"),
    *stored("avi", "utvideo", "gbrap"),
]
ANIMATIONS = [
    Case("clip.gif", "-filter_complex split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"),
    Case("clip.apng", "-c:v apng -plays 0"),
]
TAGS = [
    Case(
        f"{matrix}-{span}.mp4",
        f"-vf scale=out_color_matrix={form}:out_range={span}:flags=accurate_rnd,format=yuv444p "
        f"-c:v {X264} -colorspace {matrix} -color_range {span}",
        colour=scaled(form),
    )
    for matrix, form in (("bt709", "bt709"), ("smpte170m", "bt601"), ("bt470bg", "bt601"), ("smpte240m", "smpte240m"))
    for span in ("tv", "pc")
]
UNMARKED = [
    Case(
        f"unmarked-{height}.mp4",
        f"-vf scale={width}:{height}:out_color_matrix={form},format=yuv420p -c:v {X264} -preset ultrafast",
        colour=scaled(form),
        shown=(height, width),
    )
    for height, width, form in ((480, 640, "bt601"), (576, 720, "bt601"), (720, 1280, "bt709"))
]
RATES = [
    Case(f"rate-{i}.{suffix}", f"-c:v {X264} -pix_fmt yuv420p", rate=rate)
    for i, rate in enumerate(("24000/1001", "30000/1001", "25", "12.5", "7", "60"))
    for suffix in ("mp4", "mkv")
] + [
    Case(f"uneven.{suffix}", f"-vf setpts=(N*N/4+N)/20/TB -fps_mode vfr -c:v {X264} -pix_fmt yuv420p")
    for suffix in ("mp4", "mkv")
]
TURNED = [
    Case(f"turned-{angle}.mp4", f"-c:v {X264} -pix_fmt yuv420p", rotate=angle, shown=shown)
    for angle, shown in ((90, (WIDTH, HEIGHT)), (180, (HEIGHT, WIDTH)), (270, (WIDTH, HEIGHT)))
]
SHAPES = [
    Case(
        f"shape-{width}.{suffix}",
        f"-vf setsar={sar} -c:v {X264} -pix_fmt yuv420p",
        colour=scaled("auto", f"{width}:{HEIGHT}:"),
        shown=(HEIGHT, width),
    )
    for sar, width in (("2/1", 128), ("8/9", 57), ("16/11", 93))
    for suffix in ("mp4", "mkv")
]
WIDE = [
    Case(
        f"{transfer}.mkv",
        f"-vf zscale=p=2020:t={transfer}:m=2020_ncl:pin=709:tin=709:min=gbr:rin=full:npl=203,format=yuv444p10le "
        f"-c:v ffv1 -color_primaries bt2020 -color_trc {tag} -colorspace bt2020nc",
        colour="zscale=p=2020:t=linear:m=gbr:npl=203",
        form="gbrpf32le",
    )
    for transfer, tag in (("smpte2084", "smpte2084"), ("arib-std-b67", "arib-std-b67"), ("2020_10", "bt2020-10"))
]
CASES = [*FORMATS, *ANIMATIONS, *TAGS, *UNMARKED, *RATES, *TURNED, *SHAPES, *WIDE]


def pictures(height: int, width: int) -> np.ndarray:
    """Soft colours that move; every frame is brighter than the one before."""
    f, y, x = np.meshgrid(np.arange(COUNT), np.arange(height), np.arange(width), indexing="ij")
    red = 60 + 40 * np.sin(x / 14 + f / 9) + 5 * f
    green = 70 + 40 * np.cos(y / 12 - f / 7) + 5 * f
    blue = 80 + 30 * np.sin((x + y) / 17) + 5 * f
    return np.stack([red, green, blue], -1).round().astype(np.uint8)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_readers_see_the_same(tmp_path, case):
    path = encode(tmp_path / case.name, pictures(*case.size), case.rate, *case.words.split(" "))
    if case.rotate:
        plain = path.rename(tmp_path / "plain.mp4")
        ffmpeg("-display_rotation", case.rotate, "-i", plain, "-c", "copy", path)
    filters = f"fps={FPS}:round=up:start_time=0,{case.colour}"
    theirs = decode(path, filters, *case.shown, case.form).astype(float)
    if case.form != "rgb24":
        theirs = on_screen(theirs, "b67" in case.name)
    ours = read_clip(path, times(200, Fraction(FPS)))
    last, end = stored_times(path)[-1]
    assert ours.damage == "" and ours.frames.shape[1:] == theirs.shape[1:]
    assert abs(len(ours.frames) - len(theirs)) <= 1 + (end - last) * FPS
    for i, frame in enumerate(ours.frames[: len(theirs)]):
        assert min(abs(frame - other).max() for other in theirs[max(i - 1, 0) : i + 2]) <= LEVELS, i


def on_screen(light: np.ndarray, hlg: bool) -> np.ndarray:
    """Levels of linear light in BT.2020: in BT.709, above 95 % of white compressed with its hue kept.

    zimg applies HLG's system gamma to each channel; BT.2100 to luminance alone.
    """
    if hlg:
        scene = (light * 0.203) ** (1 / 1.2)
        light = scene * (scene @ [0.2627, 0.6780, 0.0593])[..., None] ** 0.2 / 0.203
    to_bt709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]  # BT.2407
    light = np.maximum(light @ np.transpose(to_bt709), 0)
    peak = np.maximum(light.max(-1, keepdims=True), 1e-9)
    shown = np.where(peak > 0.95, 1 - 0.05 * np.exp((0.95 - peak) / 0.05), peak)
    return np.minimum(light * shown / peak, 1) ** (1 / 2.4) * 255


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("damage", ["ends early", "lost bytes"])
def test_of_a_damaged_film_both_readers_see_the_same_frames(tmp_path, suffix, damage):
    codec = ["-c:v", "libx264", "-g", "6", "-bf", "0", "-crf", "10", "-pix_fmt", "yuv420p"]
    container = ["-movflags", "faststart"] if suffix != "mkv" else []
    path = encode(tmp_path / f"clip.{suffix}", pictures(HEIGHT, WIDTH), FPS, *codec, *container)
    whole = read_clip(path).frames
    content = bytearray(path.read_bytes())
    if damage == "ends early":
        content = content[: len(content) * 3 // 4]
    else:
        middle = len(content) // 2
        content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)
    ours = read_clip(path)
    theirs = decode(path, Case("", "").colour, HEIGHT, WIDTH)
    assert abs(len(ours.frames) - len(theirs)) <= 1 and len(ours.frames) >= 8
    assert ours.damage
    np.testing.assert_array_equal(ours.frames[0], whole[0])
    same = sum(abs(a.astype(int) - b).max() <= LEVELS for a, b in zip(ours.frames, theirs, strict=False))
    assert same >= min(len(ours.frames), len(theirs)) - 4


def test_there_are_sixty_files() -> None:
    assert len({Path(case.name).name for case in CASES}) == len(CASES) >= 60
