"""Runs every test that needs no GPU, one pytest per unit, two at a time, and continues where it was interrupted.

A unit is a test file, or the files that share a server. The JUnit file that pytest leaves when a unit has ended is the
record of it: build/test-all/<hash of the code>/ holds one per unit; one whose record has no failure is not run again.
Any change to the code starts afresh. The table of all results is build/test-all/results.md. Arguments are test files or
folders (default: tests).
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
FIRST = ("tests/serve/test_faults.py", "tests/serve/test_dashboard.py")
"""Units that take longest, so that no core waits for one at the end."""
SHARING = tuple(f"tests/serve/test_{name}.py" for name in ("dashboard", "lm_eval", "observability", "openai", "schema"))
"""Test files that ask the same server, which takes minutes to compile."""
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


def run(names: tuple[str, ...], record: Path) -> None:
    """A unit of test files, relative to ROOT."""
    partial = record.with_suffix(".partial")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", f"--junitxml={partial}", *names]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"== {' '.join(names)}\n{done.stdout}", flush=True)  # at once: two at a time would be mixed
    # 0 passed, 1 some failed, 5 nothing selected: the unit was run to its end, all else is not a result.
    if done.returncode not in (0, 1, 5):
        raise BrokenOffError(f"pytest broke off with exit code {done.returncode} in {' '.join(names)}")
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
    chosen = [Path(argument).resolve() for argument in arguments or [str(ROOT / "tests")]]
    files = [file for one in chosen for file in ([one] if one.is_file() else sorted(one.rglob("test_*.py")))]
    records: dict[tuple[str, ...], Path] = {}
    for unit in units([file.relative_to(ROOT).as_posix() for file in files]):
        of = f".{documents}" if unit[0].startswith("tests/docs/") else ""
        records[unit] = folder / f"{'+'.join(unit).replace('/', '.')}{of}.xml"
    left = [unit for unit, record in records.items() if (known := counts(record)) is None or known["failed"]]
    with ThreadPoolExecutor(2) as workers:
        order = sorted((unit for unit in left if unit[0] not in ALONE), key=lambda unit: unit[0] not in FIRST)
        running = [workers.submit(run, unit, records[unit]) for unit in order]
        try:
            for one in as_completed(running):
                one.result()
                write(records, code)
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    for unit in left:
        if unit[0] in ALONE:
            run(unit, records[unit])
    results = write(records, code)
    print((RESULTS / "results.md").read_text() if results else "no test files found")
    return 0 if results and not any(row["failed"] for row in results.values()) else 1


def units(names: list[str]) -> list[tuple[str, ...]]:
    """What one pytest runs: files that share a server together, every other by itself."""
    sharing = tuple(name for name in SHARING if name in names)
    return [*([sharing] if sharing else []), *((name,) for name in names if name not in sharing)]


def write(records: dict[tuple[str, ...], Path], code: str) -> dict[str, dict[str, float]]:
    """The table of all units that have ended, which it returns."""
    results = {" ".join(unit): known for unit, record in records.items() if (known := counts(record)) is not None}
    (RESULTS / "results.md").write_text(table(results, code))
    return results


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted: call it again to go on from here")
    except BrokenOffError as error:
        sys.exit(str(error))
