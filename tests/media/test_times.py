"""Which stored frame is read for which time. Brightness is the number of the stored frame."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from maxdiffusion.errors import UserError
from maxdiffusion.media.read import probe, read_clip, stored_times, times
from maxdiffusion.media.write import write


def levels(count, step=1):
    return np.broadcast_to((np.arange(count) * step).astype(np.uint8)[:, None, None, None], (count, 32, 48, 3))


def uneven(path, starts, base=Fraction(1, 1000)):
    """A film without loss whose frames begin at these ticks."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if path.suffix == ".mkv" else "libx264rgb", 25, options={"qp": "0"})
        stream.width, stream.height, stream.codec_context.time_base = 48, 32, base
        stream.pix_fmt = "bgr0" if path.suffix == ".mkv" else "rgb24"
        for start, pixels in zip(starts, levels(len(starts)), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = start, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(("rate", "fps"), [(30, 16), (24, 16), (16, 16), (8, 24), (50, "30000/1001"), (12, 60)])
@pytest.mark.parametrize("fmt", ["mp4", "webp"])
def test_each_time_has_the_frame_that_is_shown(tmp_path, fmt, rate, fps):
    fps = Fraction(fps)
    write(levels(40, 6), tmp_path / f"clip.{fmt}", rate, fmt, {})
    clip = read_clip(tmp_path / f"clip.{fmt}", times(500, fps))
    right = [int(k * rate / fps) for k in range(len(clip.indices))]
    assert list(clip.indices) == right
    assert len(right) == -(-40 * fps // rate)
    assert abs(clip.frames[:, 0, 0, 0] - np.array(right) * 6.0).max() <= 4
    assert clip.seconds == pytest.approx(40 / rate, abs=1e-3)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize("first", [0, 7])
def test_uneven_times_are_honoured_from_the_first_frame_shown(tmp_path, suffix, first):
    starts = [0, 100, 130, 700, 720, 1500]
    uneven(tmp_path / f"clip{suffix}", [first + start for start in starts])
    clip = read_clip(tmp_path / f"clip{suffix}", times(16, Fraction(10)))
    assert clip.indices == (0, 1, 2, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4, 4, 4, 5)
    assert [round(float(start) * 1000) for start, _ in stored_times(tmp_path / f"clip{suffix}")] == starts


def animation(path, delays, **options):
    frames = [Image.new("RGB", (48, 32), (i * 40, 20, 20)) for i in range(len(delays))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=delays, **options)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_delays_of_animations_are_honoured(tmp_path, suffix):
    animation(tmp_path / f"a.{suffix}", [100, 300, 50, 150])
    clip = read_clip(tmp_path / f"a.{suffix}", times(30, Fraction(20)))
    assert clip.indices == (0, 0, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3)
    assert clip.seconds == Fraction(6, 10) and clip.info.frames == 4 and not clip.still


@pytest.mark.parametrize(("delay", "shown"), [(0, 100), (10, 100), (20, 20), (40, 40)])
def test_a_gif_without_delay_is_shown_as_browsers_do(tmp_path, delay, shown):
    animation(tmp_path / "a.gif", [delay] * 3)
    assert stored_times(tmp_path / "a.gif")[-1] == (Fraction(2 * shown, 1000), Fraction(3 * shown, 1000))


def test_the_picture_of_an_apng_for_other_programs_is_no_frame(tmp_path):
    animation(tmp_path / "a.png", [100, 100, 100], default_image=True)
    clip = read_clip(tmp_path / "a.png")
    assert len(clip.frames) == 2 and clip.frames[0, 0, 0].tolist() == [40, 20, 20]


def test_numbers_read_stored_frames(tmp_path):
    write(levels(9, 20), tmp_path / "clip.mp4", 30, "mp4", {})
    assert read_clip(tmp_path / "clip.mp4", [0, 4, 4, 7]).indices == (0, 4, 4, 7)
    assert read_clip(tmp_path / "clip.mp4", [7, 20]).indices == (7,)


@pytest.mark.parametrize("fmt", ["png", "npy"])
def test_what_has_no_times_is_read_from_the_first_on(tmp_path, fmt):
    path = tmp_path / ("clip.npy" if fmt == "npy" else "clip")
    write(levels(9), path, 30, fmt, {})
    clip = read_clip(path, times(5, Fraction(3)))
    assert clip.indices == (0, 1, 2, 3, 4) and not clip.timed and clip.seconds is None


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".PNG", ".webp", ".bmp"])
def test_folders_of_several_kinds_are_read_in_natural_order(tmp_path, suffix):
    for i in (1, 2, 10):
        Image.new("RGB", (16, 16), (20 * i,) * 3).save(tmp_path / f"frame {i}{suffix}")
    (tmp_path / "Thumbs.db").write_text("")
    (tmp_path / f"._frame 1{suffix}").write_text("")
    assert abs(read_clip(tmp_path).frames[:, 0, 0, 0] - np.array([20.0, 40, 200])).max() <= 1


def test_a_folder_of_mixed_kinds_is_one_sentence(tmp_path):
    for name in ("1.png", "2.jpg", "3.jpg"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    with pytest.raises(UserError, match="a folder of 1 PNG and 2 JPEG files; keep frames of one kind"):
        probe(tmp_path)


@pytest.mark.parametrize("name", ["a.jpg", "b.webp", "c.png"])
def test_a_photo_is_upright(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / name, exif=exif)
    assert read_clip(tmp_path / name).still
    assert (probe(tmp_path / name).width, probe(tmp_path / name).height) == (20, 40)
    assert probe(tmp_path).width == 20


def test_a_photo_with_a_preview_is_one_picture(tmp_path):
    Image.new("RGB", (40, 20)).save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (20, 10))]
    )
    clip = read_clip(tmp_path / "a.jpg")
    assert clip.still and clip.frames.shape == (1, 20, 40, 3)
