"""Files from elsewhere, some of them hostile."""

import http.server
import os
import threading
import time

import pytest
from PIL import Image

from maxdiffusion.errors import UserError
from maxdiffusion.media import fetch
from maxdiffusion.media.read import read_video


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        getattr(self, self.path.strip("/").partition(".")[0])()

    def answer(self, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def endless(self):
        self.answer()
        try:
            while True:
                self.wfile.write(bytes(2**16))
        except OSError:  # the other side has had enough
            pass

    def slow(self):
        try:
            for byte in b"HTTP/1.0 200 OK\r\n" + b"X-Header: 1\r\n" * 4:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        except OSError:
            pass

    def short(self):
        self.answer(Content_Length="1000")
        self.wfile.write(b"few")

    def ftp(self):
        self.answer(302, Location="ftp://127.0.0.1/a.png")

    def image(self):
        self.answer()
        Image.new("RGB", (6, 4), "red").save(self.wfile, "PNG")

    def moved(self):
        self.answer(302, Location="/image.png")

    def script(self):
        self.answer()
        self.wfile.write(POSTSCRIPT)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("endless.png", "it is larger than 64 MiB"),
        ("slow.png", "it is not complete after 0.5 seconds"),
        ("short.png", "997 more expected"),
        ("ftp.png", "it leads to ftp"),
    ],
)
def test_a_download_has_bounds(url, monkeypatch, name, words):
    if name == "slow.png":
        monkeypatch.setattr(fetch, "DEADLINE", 0.5)
    with pytest.raises(UserError, match=f"{name} cannot be fetched .*{words}"):
        fetch.open_image(f"{url}/{name}")


def test_a_redirect_is_followed(url):
    assert fetch.open_image(f"{url}/moved.png").size == (6, 4)
    assert read_video(f"{url}/moved.png").shape == (1, 4, 6, 3)


def test_ghostscript_is_never_run(url, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    for location in (str(tmp_path / "a.png"), f"{url}/script.png"):
        with pytest.raises(UserError, match="is PostScript"):
            fetch.open_image(location)
        with pytest.raises(UserError, match="it is PostScript"):
            read_video(location)
    assert not (tmp_path / "ran").exists()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for read in (fetch.open_image, read_video):
        with pytest.raises(UserError, match=r"a\.png is neither a file nor a folder but a pipe"):
            read(str(tmp_path / "a.png"))


def test_a_scheme_may_be_in_capitals():
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch.open_image("HTTP://127.0.0.1:9/a.png")
