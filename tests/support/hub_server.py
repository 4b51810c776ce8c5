"""A hub in miniature: the part of the API that snapshot_download asks for, with faults on demand."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

REPO = "org/tiny"
SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
    """`cuts`: file -> how many times its body is cut in the middle. `broken`: files that fail after the cuts."""

    files: Mapping[str, bytes]
    cuts: dict[str, int] = dataclasses.field(default_factory=dict)
    broken: set[str] = dataclasses.field(default_factory=set)
    silent: bool = False  # it accepts and says nothing
    token: str | None = None  # the repository is gated: it wants this token
    requests: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)  # method, path, Range
    url: str = ""

    def bodies(self, file: str) -> list[str | None]:
        """The Range of each GET of `file`."""
        return [r for method, path, r in self.requests if method == "GET" and path == f"/{REPO}/resolve/{SHA}/{file}"]


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def send(self, status, headers=None, content=b"", body=True, cut=False):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.close_connection = True

        def answer(self, body):
            path = urlsplit(self.path).path
            if hub.silent:
                over.wait(60)
                return None
            hub.requests.append((self.command, path, self.headers.get("Range")))
            api = f"/api/models/{REPO}"
            if not path.startswith((f"{api}/", f"/{REPO}/")) and path != api:
                return self.send(404, {"X-Error-Code": "RepoNotFound"}, body=body)
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.send(403, {"X-Error-Code": "GatedRepo"}, body=body)
            if path in (api, f"{api}/revision/main", f"{api}/revision/{SHA}"):
                siblings = [{"rfilename": name} for name in hub.files]
                return self.json({"id": REPO, "sha": SHA, "siblings": siblings})
            if path.startswith(f"{api}/revision/"):
                return self.send(404, {"X-Error-Code": "RevisionNotFound"}, body=body)
            if path == f"{api}/tree/{SHA}":
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in hub.files.items()
                ]
                return self.json(tree)
            return self.file(path.removeprefix(f"/{REPO}/resolve/{SHA}/"), body)

        def json(self, content):
            self.send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

        def file(self, name, body):
            content = hub.files[name]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
            if body and hub.cuts.get(name, 0) == 0 and name in hub.broken:
                return self.send(500)
            status = 200
            if wanted := self.headers.get("Range"):
                first = int(wanted.removeprefix("bytes=").split("-")[0])
                status, headers["Content-Range"] = 206, f"bytes {first}-{len(content) - 1}/{len(content)}"
                content = content[first:]
            cut = body and hub.cuts.get(name, 0) > 0
            if cut:
                hub.cuts[name] -= 1
            return self.send(status, headers, content, body, cut)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
