"""Where things are, and what code measured something: for benchmarks, and for the runner of all tests."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
"""More models and texts than a clone has."""
CODE = [
    "pyproject.toml",
    "setup.py",
    "d2moe_vllm",
    "offline",
    "tests",
    "benchmarks",
    "examples",
    "deploy",
    "Dockerfile",
    "Makefile",
]


def commit() -> str:
    """What is checked out, with `-dirty` where something was changed since."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(describe, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def code_hash(paths: Sequence[str] = CODE) -> str:
    """Of the files as they are now, committed or not."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    digest = hashlib.sha256()
    for name in sorted(set(names)):
        if (ROOT / name).is_file():
            digest.update(f"{name}\0".encode() + hashlib.sha256((ROOT / name).read_bytes()).digest())
    return digest.hexdigest()[:12]
