"""Colours and proportions of input videos; the other reader of test_differential.py sees the same."""

import av
import numpy as np
import pytest

from maxdiffusion.media.read import probe, read_clip
from tests.support.ffmpeg import ffmpeg

# Marks of frames: (matrix, primaries, transfer).
PQ, HLG, WIDE, P3 = (9, 9, 16), (9, 9, 18), (9, 9, 14), (0, 12, 1)


def film(path, form, values, marks=(2, 2, 2), full=False, size=(48, 64)):
    """One colour without loss: `values` are those of the planes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", 25)
        stream.height, stream.width = size
        stream.pix_fmt = form
        stream.color_range = 2 if full else 1
        stream.colorspace, stream.color_primaries, stream.color_trc = marks
        frame = av.VideoFrame(size[1], size[0], form)
        for plane, value in zip(frame.planes, values, strict=True):
            deep = "10le" in form
            plane.update(np.full(plane.buffer_size // (1 + deep), value, np.uint16 if deep else np.uint8).tobytes())
        frame.pts = 0
        frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range = *marks, 2 if full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return read_clip(path)


@pytest.mark.parametrize(
    ("marks", "luma", "level"),
    [
        (HLG, 721, 253),  # 75 %, diffuse white
        (PQ, 573, 253),  # 203 cd/m2
        (HLG, 940, 255),
        (PQ, 940, 255),
        (HLG, 64, 0),
        (PQ, 64, 0),
        (HLG, 440, 123),  # 43 %: 35 cd/m2, 17 % of white
        (PQ, 448, 141),  # 44 %: 49 cd/m2, 24 % of white
        (WIDE, 502, 128),
        (WIDE, 940, 255),
    ],
)
def test_hdr_is_mapped_with_its_white_at_white(tmp_path, marks, luma, level):
    clip = film(tmp_path / "clip.mkv", "yuv444p10le", (luma, 512, 512), marks)
    assert abs(clip.frames[0, 9, 9].astype(int) - level).max() <= 1
    words = {16: "PQ BT.2020, mapped to SDR BT.709", 18: "HLG BT.2020, mapped to SDR BT.709"}
    assert clip.colour == words.get(marks[2], "BT.2020, converted to BT.709")


@pytest.mark.parametrize(
    ("form", "values", "marks", "right"),
    [  # planes are green, blue, red
        ("gbrp10le", (290, 210, 743), P3, (200, 60, 40)),
        ("gbrp10le", (0, 0, 802), P3, (219, 0, 0)),
        ("gbrp10le", (514, 514, 514), P3, (128, 128, 128)),
        ("yuv444p10le", (500, 540, 480), HLG, (116, 148, 159)),  # by hand, from BT.2100
    ],
)
def test_wide_gamuts_become_bt709(tmp_path, form, values, marks, right):
    clip = film(tmp_path / "clip.mkv", form, values, marks)
    assert abs(clip.frames[0, 9, 9].astype(int) - right).max() <= 2


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("matrix", "kr", "kb"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (5, 0.299, 0.114)])
def test_marked_matrices_and_ranges_are_right(tmp_path, matrix, kr, kb, full):
    y, u, v = 120, 110, 160
    luma, blue, red = (y / 255, (u - 128) / 255, (v - 128) / 255) if full else ((y - 16) / 219, -18 / 224, 32 / 224)
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    right = np.array([r, (luma - kr * r - kb * b) / (1 - kr - kb), b]) * 255
    clip = film(tmp_path / "clip.mkv", "yuv444p", (y, u, v), (matrix, 1, 1), full)
    assert abs(clip.frames[0, 9, 9] - right).max() <= 1.5
    assert clip.colour == ("BT.709" if matrix == 1 else "BT.601") + (", full range" if full else "")


@pytest.mark.parametrize(
    ("size", "name"), [((48, 64), "BT.601"), ((576, 720), "BT.601"), ((578, 720), "BT.709"), ((540, 1280), "BT.709")]
)
def test_unmarked_colours_are_taken_by_size(tmp_path, size, name):
    assert film(tmp_path / "clip.mkv", "yuv420p", (120, 110, 160), size=size).colour == f"unmarked, read as {name}"


def test_grey_and_rgb_need_no_matrix(tmp_path):
    assert film(tmp_path / "grey.mkv", "gray", (120,)).colour == "grey"
    assert film(tmp_path / "rgb.mkv", "gbrp10le", (481, 361, 241), (0, 1, 1)).frames[0, 0, 0].tolist() == [60, 120, 90]


@pytest.mark.parametrize(("shape", "width"), [("2/1", 128), ("8/9", 57), ("16/11", 93), (1, 64)])
def test_pixels_that_are_not_square_are_shown_in_proportion(tmp_path, shape, width):
    ffmpeg("-f", "lavfi", "-i", "color=gray:size=64x48:duration=0.1", "-vf", f"setsar={shape}", tmp_path / "clip.mkv")
    clip = read_clip(tmp_path / "clip.mkv", [0])
    assert clip.frames.shape == (1, 48, width, 3) and probe(tmp_path / "clip.mkv").width == width


@pytest.mark.parametrize("form", ["yuva420p", "yuva444p10le", "gbrap10le"])
def test_alpha_is_read_where_it_is_asked_for(tmp_path, form):
    deep = 4 if "10le" in form else 1
    film(
        tmp_path / "clip.mkv",
        form,
        (120 * deep, 128 * deep, 128 * deep, 40 * deep),
        (0 if form == "gbrap10le" else 6, 1, 1),
    )
    clip = read_clip(tmp_path / "clip.mkv", alpha=True)
    assert clip.frames.shape[-1] == 4 and abs(int(clip.frames[0, 0, 0, 3]) - 40) <= 1
    assert read_clip(tmp_path / "clip.mkv").frames.shape[-1] == 3
