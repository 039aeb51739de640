"""A stand-in of the Hub on this machine, which says what was asked of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789" * 4


@dataclass
class Hub:
    """address: what HF_ENDPOINT has to be; fetched: files whose contents were asked for, by their paths."""

    address: str = ""
    fetched: list[str] = field(default_factory=list)


def use(patch: pytest.MonkeyPatch, address: str, home: Path) -> None:
    """This process asks the stand-in, and keeps what it gets under `home`."""
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Every repository on it is the folder."""
    hub = Hub()
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, with_body: bool) -> None:
            name = self.path.partition("/resolve/")[2].partition("/")[2].partition("?")[0]
            if "/tree/" in self.path:
                body = json.dumps([
                    {"type": "file", "path": name, "size": path.stat().st_size,
                     "oid": hashlib.sha1(path.read_bytes()).hexdigest()}
                    for name, path in files.items()
                ]).encode()  # fmt: skip
            elif self.path.startswith("/api/models/"):
                siblings = [{"rfilename": name} for name in files]
                body = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}).encode()
            elif name in files:
                body = files[name].read_bytes()
                if with_body:
                    hub.fetched.append(name)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Nothing on the test's output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()
