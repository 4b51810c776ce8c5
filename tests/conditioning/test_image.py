"""Images that a run starts from: fetched and fitted."""

import http.server
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from maxdiffusion.conditioning import image
from maxdiffusion.config import Config
from maxdiffusion.errors import UserError
from maxdiffusion.media import fetch
from maxdiffusion.request import Job, Segments, Video
from maxdiffusion.request.session import Session
from maxdiffusion.runtime.stages import Stages
from maxdiffusion.variants import get


def video(path, width=32, height=16):
    return Video("a", "", 0, width, height, image=str(path))


def read(*videos):
    """The fitted images of a run of these videos."""
    images = {at: fetch.open_image(at) for each in videos for at in each.images}
    return image.read_first(job(*videos), images)


def job(*videos):
    """A run of these videos."""
    return Job(Config.model_construct(), get("wan2.2-ti2v"), tuple(videos), Segments(1, 1))


def test_an_image_of_another_shape_covers_the_video_and_is_cropped_in_the_middle(tmp_path, caplog):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[8:32] = 200  # what is left of a square in a video of half its height, with two rows of black on each side
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with caplog.at_level("INFO", "maxdiffusion"):
        ((key, fitted),) = read(video(tmp_path / "a.png"), video(tmp_path / "a.png")).items()
    assert key == (str(tmp_path / "a.png"), 32, 16) and fitted.shape == (16, 32, 3)
    np.testing.assert_allclose(fitted, 200 / 255 * 2 - 1, atol=0.3)
    assert "40 x 40 pixels, made 32 x 32, cropped to 32 x 16" in caplog.text


def test_videos_of_other_sizes_have_their_own_image(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    wanted = [video(tmp_path / "a.png"), video(tmp_path / "a.png", 16, 16)]
    assert [value.shape for value in read(*wanted).values()] == [(16, 32, 3), (16, 16, 3)]
    assert read(Video("a", "", 0, 32, 16)) is None


def test_a_first_frame_is_given_where_there_is_an_image(tmp_path):
    Image.new("RGB", (32, 16)).save(tmp_path / "a.png")
    videos = [Video("a", "", 0, 32, 16), video(tmp_path / "a.png")]

    class WithoutCheckpoint(Session):
        job = job(*videos)
        stages = Stages("off")

        def load(self, net):
            return SimpleNamespace(encode=lambda x: x[:, :, ::8, ::8])

    session = object.__new__(WithoutCheckpoint)
    without, given = image.encode_first(session, read(*videos))
    assert without.first is None and given.first.shape == (1, 2, 4, 3)


def test_a_url_is_fetched_once(tmp_path, monkeypatch):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            asked.append(args)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert [fetch.open_image(f"{url}/a.png").size for _ in range(2)] == [(6, 4)] * 2
        assert len(asked) == 1
        with pytest.raises(UserError, match=r"cannot be fetched.*404"):
            fetch.open_image(f"{url}/b.png")
    finally:
        server.shutdown()
        server.server_close()


def test_an_image_is_turned_as_its_camera_noted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert fetch.open_image(str(tmp_path / "a.jpg")).size == (4, 6)


def test_an_image_of_16_bits_keeps_its_greys(tmp_path):
    """Pillow alone makes all but the darkest of them white."""
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(fetch.open_image(str(tmp_path / "a.png")))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_an_image_without_a_known_white_is_refused(tmp_path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff cannot be read as an image \(its pixels are numbers of 32 bits"):
        fetch.open_image(str(tmp_path / "a.tiff"))


def test_an_image_that_is_too_narrow_is_refused(tmp_path):
    Image.new("RGB", (1, 60_000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"1 wide x 60000 high, which covers 480 x 320 only at 480 x 28800000 pixels"):
        read(video(tmp_path / "a.png", 480, 320))
