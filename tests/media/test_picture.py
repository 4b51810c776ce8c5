"""Pictures as people have them: turned, in other colour spaces, transparent, and other things than pictures."""

import io
import logging
import sys
import zipfile

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from maxdiffusion.errors import UserError
from maxdiffusion.media.fetch import open_image, open_picture
from maxdiffusion.media.frames import as_mask
from maxdiffusion.media.picture import convert
from maxdiffusion.media.read import read_video
from tests.support import icc

pillow_heif.register_heif_opener()
COLOURS = np.array([(200, 40, 40), (40, 200, 40), (30, 60, 220), (128, 128, 128), (255, 255, 255), (90, 160, 170)])


def saved(folder, pixels, name="a.png", mode=None, **options):
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(folder / name, **options)
    return str(folder / name)


def pixels(image):
    return np.asarray(image).astype(int)


SPACES = {
    "Adobe RGB": (icc.ADOBE, 563 / 256, icc.D65),
    "Display P3": (icc.P3, 2.2, icc.D65),
    "ProPhoto": (icc.PROPHOTO, 1.8, icc.D50),
    "another white": (icc.SRGB, 1.0, icc.D50),
}


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_a_profile_of_primaries_is_made_srgb(tmp_path, name, suffix):
    primaries, gamma, white = SPACES[name]
    profile = icc.rgb(primaries, gamma, name, white)
    lossless = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path, COLOURS[None], f"a.{suffix}", icc_profile=profile, **lossless)
    right = [icc.srgb_of(icc.to_xyz(primaries, white) @ (colour / 255) ** gamma) for colour in COLOURS]
    picture = open_picture(path)
    assert abs(pixels(picture.rgb)[0] - right).max() <= 2  # curves of 8 bits in the profile
    assert picture.colour == f"{name} made sRGB"


def test_the_red_of_adobe_rgb(tmp_path):
    path = saved(tmp_path, [[(200, 40, 40)]], icc_profile=icc.rgb(icc.ADOBE, 563 / 256))
    assert open_image(path).getpixel((0, 0)) == (233, 35, 35)


def test_transparent_and_palette_images_keep_their_profile(tmp_path):
    profile = icc.rgb(icc.ADOBE, 563 / 256)
    rgba = saved(tmp_path, [[(200, 40, 40, 255), (200, 40, 40, 0)]], icc_profile=profile)
    picture = open_picture(rgba)
    assert pixels(picture.rgb).tolist() == [[[233, 35, 35]] * 2] and pixels(picture.alpha).tolist() == [[255, 0]]
    Image.fromarray(np.full((2, 2, 3), (200, 40, 40), np.uint8)).quantize(4).save(
        tmp_path / "p.png", icc_profile=profile
    )
    assert open_image(str(tmp_path / "p.png")).getpixel((0, 0)) == (233, 35, 35)


def test_an_srgb_profile_changes_nothing(tmp_path):
    path = saved(tmp_path, COLOURS[None], icc_profile=icc.rgb(icc.SRGB, 2.2, "sRGB IEC61966-2.1"))
    assert (pixels(open_image(path))[0] == COLOURS).all() and open_picture(path).colour == ""


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2])
def test_greys_by_their_profile(tmp_path, gamma):
    path = saved(tmp_path, [[0, 64, 128, 255]], icc_profile=icc.grey(gamma))
    right = [icc.srgb_of(icc.D50 * (level / 255) ** gamma) for level in (0, 64, 128, 255)]
    assert abs(pixels(open_image(path))[0] - right).max() <= 1


def test_transparent_greys_by_their_profile(tmp_path):
    picture = open_picture(saved(tmp_path, [[[128, 255], [128, 0]]], icc_profile=icc.grey(1.0)))
    assert pixels(picture.rgb).tolist() == [[[188] * 3] * 2] and pixels(picture.alpha).tolist() == [[255, 0]]


def test_greys_with_a_profile_of_rgb(tmp_path):
    path = saved(tmp_path, np.full((8, 8), 128), "a.jpg", icc_profile=icc.rgb(icc.SRGB, 1.0), quality=100)
    assert open_image(path).getpixel((4, 4)) == (188, 188, 188)


def test_greys_of_16_bits_with_a_profile(tmp_path):
    Image.fromarray(np.array([[0, 257 * 128, 65535]], np.uint16)).save(tmp_path / "a.png", icc_profile=icc.grey(1.0))
    assert pixels(open_image(str(tmp_path / "a.png")))[0].tolist() == [[0] * 3, [188] * 3, [255] * 3]


INKS = {
    (0, 0, 0, 0): (255, 255, 255),
    (1, 0, 0, 0): (0, 150, 220),
    (0, 1, 0, 0): (220, 40, 130),
    (0, 0, 1, 0): (250, 230, 40),
}


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_inks_by_their_profile(tmp_path, suffix):
    corners = np.array([*INKS, (0, 0, 0, 1)]) * 255
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(
        np.repeat(corners, 16, 0).astype(np.uint8).repeat(1, 0).reshape(1, -1, 4).repeat(16, 0), "CMYK"
    )
    image.save(path, icc_profile=icc.cmyk(INKS), quality=100)
    found = pixels(open_image(str(path)))[8, 8::16]
    assert abs(found - [*INKS.values(), (0, 0, 0)]).max() <= 4  # 8 bits of CIELAB


def test_inks_without_a_profile_are_said(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.tiff")
    picture = open_picture(str(tmp_path / "a.tiff"))
    assert picture.rgb.getpixel((0, 0)) == (255, 0, 0) and picture.colour == "CMYK without a profile, made RGB"


@pytest.mark.parametrize(
    "profile",
    [b"no profile", icc.rgb(icc.ADOBE, 2.2)[:200], icc.grey(2.2), icc.cmyk(INKS)],
    ids=["text", "cut", "grey", "inks"],
)
def test_a_profile_that_cannot_be_used_is_ignored_and_said(tmp_path, caplog, profile):
    path = saved(tmp_path, COLOURS[None], icc_profile=profile)
    with caplog.at_level(logging.INFO):
        assert (pixels(open_image(path))[0] == COLOURS).all()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "its colour profile cannot be used" in said and said.endswith("is ignored")


# ---- orientation

QUARTERS = np.zeros((32, 64, 3), np.uint8)
QUARTERS[:16, :32] = 255  # white: the corner that orientation 6 brings to the right


@pytest.mark.parametrize(
    ("orientation", "size", "corner"), [(3, (64, 32), (48, 24)), (6, (32, 64), (24, 16)), (8, (32, 64), (8, 48))]
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp", "heic", "avif"])
def test_pictures_are_upright(tmp_path, orientation, size, corner, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, QUARTERS, f"a.{suffix}", exif=exif.tobytes())
    image = open_image(path)
    assert image.size == size and image.getpixel(corner)[0] > 240
    assert sum(image.resize((2, 2), Image.Resampling.BOX).convert("L").tobytes()) < 300  # one quarter is white
    assert pixels(convert(Image.open(path)).rgb).shape == (size[1], size[0], 3)
    if suffix in ("heic", "avif"):
        assert read_video(path).shape[0] == 1  # by the same reader, not by ffmpeg


def test_a_phone_s_photo_in_display_p3(tmp_path):
    path = saved(
        tmp_path, np.full((64, 64, 3), (200, 40, 40)), "IMG_1.HEIC", icc_profile=icc.rgb(icc.P3, 2.2), quality=100
    )
    right = icc.srgb_of(icc.to_xyz(icc.P3) @ (np.array([200, 40, 40]) / 255) ** 2.2)
    assert abs(np.array(open_image(path).getpixel((32, 32))) - right).max() <= 4


def test_without_the_package_the_sentence_names_the_extra(tmp_path, monkeypatch):
    path = saved(tmp_path, np.zeros((64, 64, 3)), "a.heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for read in (open_image, read_video):
        with pytest.raises(UserError, match=r"a\.heic cannot be read.*HEIC photo; pip install 'maxdiffusion\[heif\]'"):
            read(path)


def test_a_photo_with_a_gain_map_is_one_picture(tmp_path):
    photo, gain = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (16, 12))
    photo.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[gain])
    assert read_video(tmp_path / "a.jpg").shape == (1, 48, 64, 3)
    assert open_image(str(tmp_path / "a.jpg")).getpixel((30, 20))[0] > 240


# ---- alpha


def test_what_is_transparent_is_said(tmp_path, caplog):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[:, 0] = (200, 30, 30, 255)
    rgba[:, 1] = (100, 100, 100, 128)
    path = saved(tmp_path, rgba)
    with caplog.at_level(logging.INFO):
        assert pixels(open_image(path))[0].tolist() == [[200, 30, 30], [100] * 3, [0] * 3]
        assert pixels(open_image(path, "white"))[0].tolist() == [[200, 30, 30], [177] * 3, [255] * 3]
    dropped, white = [record.getMessage() for record in caplog.records]
    assert "shows the colours stored below it" in dropped and "stands on white" in white


def test_an_opaque_alpha_is_nothing_to_say(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        open_image(saved(tmp_path, np.full((2, 2, 4), 255)), "white")
    assert not caplog.records


@pytest.mark.parametrize("mode", ["LA", "P", "grey with a transparent level"])
def test_every_way_of_transparency(tmp_path, mode):
    if mode == "LA":
        path = saved(tmp_path, [[[90, 255], [90, 0]]])
    else:
        image = Image.fromarray(np.array([[90, 7]], np.uint8))
        if mode == "P":
            image = image.convert("P")
        image.save(tmp_path / "a.png", transparency=7)
        path = str(tmp_path / "a.png")
    assert pixels(open_picture(path).alpha).tolist() == [[255, 0]]
    assert pixels(open_image(path, "white"))[0].tolist() == [[90] * 3, [255] * 3]


def test_the_alpha_of_a_mask_is_its_content():
    frames = np.zeros((3, 2, 2, 4), np.uint8)
    frames[0, ..., 3] = 255
    frames[1, 0, 0, 3] = 255
    frames[2, 0, 0] = (255, 0, 0, 128)
    assert as_mask(frames)[..., 0].tolist() == [[[255, 255], [255, 255]], [[255, 0], [0, 0]], [[128, 0], [0, 0]]]
    frames[..., 3] = 255
    np.testing.assert_array_equal(as_mask(frames), frames[..., :3])


# ---- other things


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.svg", b"<?xml version='1.0'?>\n<svg/>", "is an SVG drawing.*export it as PNG"),
        ("a.pdf", b"%PDF-1.7\n", "is a PDF document"),
        ("a.CR2", b"II*\0\x10\0\0\0CR\x02\0", "is a camera's raw file; develop it"),
        ("a.nef", b"MM\0*\0\0\0\x08", "is a camera's raw file"),
        ("a.cr3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "is a camera's raw file"),
        ("a.psd", b"8BPS\0\1", "is a Photoshop file"),
        ("a.jxl", b"\xff\x0a\0\0", "is a JPEG XL image"),
        ("a.png", b"<!DOCTYPE html><html>", "is a web page.*download the file"),
        ("a.png", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
        ("a.png", zipped(), "is a zip archive.*unpack it"),
        ("a.png", b"", "is an empty file"),
        ("a.jpg", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "is a video.*one of its frames"),
        ("a.jpg", b"some text", "it is none of PNG, JPEG"),
        ("a.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF", "is a JPEG file that is damaged or not whole"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} .*{words}"):
        open_image(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "heic"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_a_picture_that_ends_early_is_one_sentence(tmp_path, suffix, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    path = tmp_path / f"a.{suffix}"
    saved(tmp_path, noise, path.name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(UserError, match=r"damaged or not whole; save or download it again"):
        open_image(str(path))


def test_a_picture_that_would_fill_the_memory(tmp_path, monkeypatch):
    path = saved(tmp_path, np.zeros((64, 64, 3)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"a\.png has more than 2,000 pixels; make it smaller"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["tiff", "png"])
def test_other_depths_and_spaces(tmp_path, suffix):
    if suffix == "tiff":
        Image.new("LAB", (4, 4), (136, 128 + 60, 128 + 40)).save(tmp_path / "a.tiff")  # CIELAB 53, 60, 40
        assert np.abs(icc.lab_of(open_image(str(tmp_path / "a.tiff")).getpixel((1, 1))) - (53.3, 60, 40)).max() < 2
    else:
        Image.new("1", (4, 4), 1).save(tmp_path / "a.png")
        assert open_image(str(tmp_path / "a.png")).getpixel((1, 1)) == (255, 255, 255)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(UserError, match="is a folder; give an image file"):
        open_image(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"#EXTM3U\n#EXTINF:1,\na.ts\n", b"ffconcat version 1.0\nfile a.mp4\n", b"[playlist]\n"]
)
def test_a_playlist_is_named(tmp_path, content):
    (tmp_path / "a.m3u8").write_bytes(content)
    with pytest.raises(UserError, match="it is a playlist, not a video; download the video"):
        read_video(tmp_path / "a.m3u8")
