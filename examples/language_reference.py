"""Python's own language reference as text: in every CPython, so the demo and the tests need no download.

It differs between Python versions; nothing may depend on a figure measured on it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics


def is_held_out(topic: str) -> bool:
    """One topic in five, by the hash of its name."""
    return hashlib.sha256(topic.encode()).digest()[0] % 5 == 0


def split() -> tuple[str, str]:
    """Calibration and held-out text; no topic is in both."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    for topic in sorted(topics):
        parts[is_held_out(topic)].append(topics[topic])
    return "\n\n".join(parts[False]), "\n\n".join(parts[True])


def write(folder: Path) -> tuple[Path, Path]:
    """calibration.txt and held-out.txt in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "calibration.txt", folder / "held-out.txt"
    for path, text in zip(paths, split(), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


if __name__ == "__main__":
    calibration, held_out = write(Path(sys.argv[1] if len(sys.argv) > 1 else "build/texts"))
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (calibration, held_out)}
    print(json.dumps(digests, indent=1))
