"""A checkpoint by its Hub id, after `import d2moe_vllm.hf`, from a local stand-in of the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from compression import ROOT

COMMIT = "0123456789" * 4


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[str]:
    """Its address; every repository on it is the checkpoint."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, with_body: bool) -> None:
            file = checkpoint / self.path.rpartition("/")[2]
            if "/tree/" in self.path:
                entries = [(path.name, path.read_bytes()) for path in checkpoint.iterdir()]
                body = json.dumps([
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in entries
                ]).encode()  # fmt: skip
            elif self.path.startswith("/api/models/"):
                files = [{"rfilename": path.name} for path in checkpoint.iterdir()]
                body = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": files}).encode()
            elif "/resolve/" in self.path and file.is_file():
                body = file.read_bytes()
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
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_manifest_is_fetched_with_the_weights(hub: str, tmp_path: Path) -> None:
    """transformers fetches the files it knows; without the manifest the checkpoint could not be checked."""
    code = (
        "import d2moe_vllm.hf\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained('someone/tiny')).__name__)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "D2MixtralForCausalLM"
    (manifest,) = tmp_path.rglob("d2moe_manifest.json")
    assert manifest.parent.name == COMMIT
