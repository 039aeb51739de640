"""`make test-gpu`: the tests that need an NVIDIA GPU, then the layer benchmark on it. Arguments go to pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def main() -> None:
    if not torch.cuda.is_available():
        sys.stderr.write("test-gpu: torch finds no NVIDIA GPU here; run it on a machine with one\n")
        raise SystemExit(2)
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", *sys.argv[1:]]
    for command in (tests, [sys.executable, str(HERE.parent / "benchmarks" / "bench_layer.py")]):
        if code := subprocess.run(command, cwd=HERE.parent, check=False).returncode:
            raise SystemExit(code)


if __name__ == "__main__":
    main()
