"""`make demo`'s program, from start to end."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from compression import ROOT
from processes import processes


def test_the_demo_shows_what_it_promises_and_leaves_nothing_running(tmp_path: Path) -> None:
    copy = tmp_path / "project"
    shutil.copytree(ROOT / "examples", copy / "examples")
    done = subprocess.run(
        [sys.executable, "examples/demo.py"], check=False, cwd=copy, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = dict(re.findall(r"^(parameters|bytes on disk)\s+[\d,]+\s+([\d,]+)", done.stdout, re.MULTILINE))
    assert int(sizes["bytes on disk"].replace(",", "")) < 0.6 * 8_807_392
    before, after = re.search(r"perplexity, in-domain\s+([\d.]+)\s+([\d.]+)", done.stdout).groups()
    assert float(before) < float(after) < 2 * float(before)
    answers = re.findall(r"->  '(.+)'", done.stdout)
    assert len(answers) == 2
    assert "server stopped" in done.stdout
    assert processes(str(copy)) == []
