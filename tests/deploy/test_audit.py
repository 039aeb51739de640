"""`make audit`'s program: what a service of vulnerabilities answers is told, and an unreachable one is no good news."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from dockerfile import ROOT

pytest.importorskip("pip_audit", reason="pip-audit is not installed: make setup")

KNOWN = {"id": "GHSA-0000-0000-0000", "summary": "made up", "aliases": [], "modified": "2026-01-01T00:00:00Z"}
AFFECTED = [
    {
        "package": {"ecosystem": "PyPI", "name": "numpy"},
        "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}],
    }
]


class Osv(BaseHTTPRequestHandler):
    """Answers as api.osv.dev does: one vulnerability of numpy, none of anything else."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = asked["package"]["name"] == "numpy"
        body = json.dumps({"vulns": [{**KNOWN, "affected": AFFECTED}]} if known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def osv() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Osv)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()


def audit(tmp_path: Path, url: str, *pins: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "lock.txt").write_text("\n".join(pins))
    command = [sys.executable, "deploy/audit.py", "--osv-url", url, str(tmp_path / "lock.txt")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_known_vulnerability_is_named(osv: str, tmp_path: Path) -> None:
    done = audit(tmp_path, osv, "numpy==1.0", "pyyaml==6.0")
    assert done.returncode == 1, done.stderr
    assert "numpy 1.0: GHSA-0000-0000-0000, mended in 2.0" in done.stdout
    assert "2 packages asked about, 1 known vulnerabilities" in done.stdout


def test_no_news_from_the_service_is_good_news(osv: str, tmp_path: Path) -> None:
    done = audit(tmp_path, osv, "pyyaml==6.0")
    assert (done.returncode, done.stderr) == (0, "")


def test_no_service_is_no_news(tmp_path: Path) -> None:
    """Nothing listens at that port; one line says so, and the exit code is neither 0 nor 1."""
    done = audit(tmp_path, "http://127.0.0.1:9", "numpy==1.0")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("audit: OSV could not be asked")


@pytest.mark.parametrize("lock", sorted(ROOT.glob("deploy/*/constraints.txt")), ids=lambda path: path.parent.name)
def test_every_pin_of_the_locks_is_asked_about(lock: Path, osv: str, tmp_path: Path) -> None:
    """pip-audit reads the locks as they are; what is for other machines is left out."""
    pins = lock.read_text()
    done = audit(tmp_path, osv, *[line for line in pins.splitlines() if not line.startswith("numpy")])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split(": ")[1].split()[0]) > 150
    assert "not asked about" not in done.stdout
