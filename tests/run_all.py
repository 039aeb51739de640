"""Runs every test that needs no GPU, one pytest per test file, two at a time, and continues where it was interrupted.

The JUnit file pytest leaves when a test file has ended is the record of it: build/test-all/<hash of the code>/ holds
one per test file, and a file whose record has no failure is not run again. Any change to the code starts afresh. The
table of all results is build/test-all/results.md. Arguments are test files or folders (default: tests).
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from places import ROOT, code_hash

RESULTS = ROOT / "build" / "test-all"
ALONE = ("tests/deploy/test_rehearsal.py", "tests/serve/test_bench_server.py", "tests/serve/test_load.py")
"""Test files that measure times or memory of the whole machine: run after all others, one by one."""
FIRST = ("tests/serve/test_faults.py", "tests/serve/test_observability.py")
"""What takes longest, so that no core waits for it at the end."""
DOCUMENTS = ["README.md", "SECURITY.md", "CHANGELOG.md", "docs"]
"""What tests/docs reads: only its records are of these too."""


class BrokenOffError(Exception):
    """pytest ended without a result."""


def counts(record: Path) -> dict[str, float] | None:
    """What a record says; None where the test file has not ended yet."""
    if not record.exists():
        return None
    suite = ElementTree.parse(record).find("testsuite")
    assert suite is not None
    total, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return {
        "passed": total - skipped - failed,
        "skipped": skipped,
        "failed": failed,
        "seconds": float(suite.attrib["time"]),
    }


def run(test_file: Path, record: Path) -> None:
    partial = record.with_suffix(".partial")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", f"--junitxml={partial}", str(test_file)]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"== {test_file.relative_to(ROOT)}\n{done.stdout}", flush=True)  # at once: two at a time would be mixed
    # 0 passed, 1 some failed, 5 nothing selected: the file was run to its end, all else is not a result.
    if done.returncode not in (0, 1, 5):
        raise BrokenOffError(f"pytest broke off with exit code {done.returncode} in {test_file}")
    partial.replace(record)


def table(results: dict[str, dict[str, float]], code: str) -> str:
    total = {key: sum(row[key] for row in results.values()) for key in ("passed", "skipped", "failed", "seconds")}
    packages = ", ".join(f"{name} {version(name)}" for name in ("vllm", "torch", "transformers"))
    python = ".".join(map(str, sys.version_info[:3]))
    head = [
        "# Results of `make test-all`",
        "",
        f"Code `{code}`, Python {python}, {packages}, {os.cpu_count()} cores.",
        "",
        "| test file | passed | skipped | failed | seconds |",
        "|---|--:|--:|--:|--:|",
    ]
    rows = [
        f"| {name} | {row['passed']:.0f} | {row['skipped']:.0f} | {row['failed']:.0f} | {row['seconds']:.0f} |"
        for name, row in {**results, "**all**": total}.items()
    ]
    return "\n".join([*head, *rows]) + "\n"


def main(arguments: list[str]) -> int:
    code, documents = code_hash(), code_hash(DOCUMENTS)
    folder = RESULTS / code
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, Path] = {}
    for chosen in [Path(argument).resolve() for argument in arguments or [str(ROOT / "tests")]]:
        for test_file in [chosen] if chosen.is_file() else sorted(chosen.rglob("test_*.py")):
            name = test_file.relative_to(ROOT).as_posix()
            of = f".{documents}" if name.startswith("tests/docs/") else ""
            records[name] = folder / f"{name.replace('/', '.')}{of}.xml"
    left = [name for name, record in records.items() if (known := counts(record)) is None or known["failed"]]
    with ThreadPoolExecutor(2) as workers:
        order = sorted((name for name in left if name not in ALONE), key=lambda name: name not in FIRST)
        running = [workers.submit(run, ROOT / name, records[name]) for name in order]
        try:
            for one in as_completed(running):
                one.result()
                write(records, code)
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    for name in left:
        if name in ALONE:
            run(ROOT / name, records[name])
    results = write(records, code)
    print((RESULTS / "results.md").read_text() if results else "no test files found")
    return 0 if results and not any(row["failed"] for row in results.values()) else 1


def write(records: dict[str, Path], code: str) -> dict[str, dict[str, float]]:
    """The table of all test files that have ended, which it returns."""
    results = {name: known for name, record in records.items() if (known := counts(record)) is not None}
    (RESULTS / "results.md").write_text(table(results, code))
    return results


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted: call it again to go on from here")
    except BrokenOffError as error:
        sys.exit(str(error))
