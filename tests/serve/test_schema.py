"""Our own routes under schemathesis: requests drawn from their OpenAPI description, right ones and wrong ones, to the
real server. No 5xx, and no status, type or body that the description does not have."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest

pytest.importorskip("vllm")

from openai import OpenAI

from offline.compare.server import Server

SEED = 7
PATHS = ("/v1/d2moe", "/v1/d2moe/info", "/v1/d2moe/", "/v1/d2moe/nothing", "/v1/d2moe/../d2moe/info", "/v1/d2moe%00")
METHODS = ("GET", "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
HEADERS = (
    {"Accept": "image/png"}, {"Accept": ""}, {"Range": "bytes=5-1"}, {"Content-Type": "application/json"},
    {"If-None-Match": "*"}, {"X-Request-Id": "x" * 4000}, {"Accept-Encoding": "gzip;q=-1"}, {"Connection": "close"},
    {"Host": "elsewhere"}, {"Origin": "null"},
)  # fmt: skip
BODIES = (b"", b"{", b'{"a": 1}', b"\0" * 1000, b"[" * 5000)


def test_schemathesis_finds_nothing(server: Server, client: OpenAI, tmp_path: Path) -> None:
    """Its examples, its coverage of boundaries, missing and unknown methods, and fuzzing; with every check it has."""
    url = f"http://127.0.0.1:{server.port}/openapi.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run", url, "--include-path-regex", "^/v1/d2moe",
            "--header", f"Authorization: Bearer {client.api_key}", "--phases", "examples,coverage,fuzzing",
            "--mode", "all", "--max-examples", "100", "--seed", str(SEED), "--checks", "all", "--no-color",
        ],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 operations" in " ".join(done.stdout.split()) or "Tested: 2" in " ".join(done.stdout.split())


def test_wrong_requests_are_answered_and_the_server_goes_on(server: Server, client: OpenAI) -> None:
    """Methods, paths, queries, headers, bodies and keys as they should not be: 200 with the right key and GET alone."""
    chance, statuses = random.Random(SEED), Counter[int]()
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as http:
        for _ in range(300):
            method, path, key = chance.choice(METHODS), chance.choice(PATHS), chance.choice(("right", "wrong", "none"))
            keys = {"right": f"Bearer {client.api_key}", "wrong": chance.choice(("Bearer x", "Basic x", "Bearer"))}
            headers = {**chance.choice(HEADERS), **({"Authorization": keys[key]} if key in keys else {})}
            query = chance.choice(("", "?x=1", "?" + "a=b&" * 500, "?%ff=%00", "?__proto__=1"))
            body = chance.choice(BODIES) if method in ("POST", "PUT", "PATCH") else None
            answer = http.request(method, path + query, headers=headers, content=body)
            statuses[answer.status_code] += 1
            assert answer.status_code in (200, 400, 401, 404, 405, 307), (method, path, key, answer.text)
            assert "Traceback" not in answer.text
            if answer.status_code == 200:
                assert (method, key) == ("GET", "right")
            elif key != "right" and method != "OPTIONS":
                assert answer.status_code in (400, 401), (method, path, key)
        assert http.get("/v1/d2moe/info", headers={"Authorization": keys["right"]}).json()["model"] == "tiny"
    print(statuses)
    assert {200, 401, 404, 405} <= set(statuses)
