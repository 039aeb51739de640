"""Runs every test but those that need a GPU and those of `make families` alone, one pytest per unit, two at a time, and
continues where it was interrupted.

A unit is a test file, or some that share a server or are short. The JUnit file that pytest leaves when a unit has ended
is the record of it: build/test-all/<hash of the code>/ holds one per unit; one whose record has no failure is not run
again. Any change to the code starts afresh. The table of all results is build/test-all/results.md. Arguments are test
files or folders (default: tests).
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
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
SHORT = ("tests/deploy", "tests/docs", "tests/offline", "tests/ops")
"""Folders whose files run CHUNK by one pytest: to start it takes longer than most of them."""
CHUNK = 5
DOCUMENTS = ["README.md", "SECURITY.md", "CHANGELOG.md", "docs"]
"""What tests/docs reads: only its records are of these too."""


class BrokenOffError(Exception):
    """pytest ended without a result."""


def counts(record: Path) -> dict[str, dict[str, float]] | None:
    """What a record says of each of its test files; None where the unit has not ended yet."""
    if not record.exists():
        return None
    found: dict[str, dict[str, float]] = {}
    for case in ElementTree.parse(record).iter("testcase"):
        # A file that cannot be imported is a case without a class, by its own name.
        module = re.match(r"tests(\.\w+)*\.test_\w+", case.attrib["classname"] or case.attrib["name"])
        assert module is not None, case.attrib
        row = found.setdefault(
            f"{module[0].replace('.', '/')}.py", {"passed": 0, "skipped": 0, "failed": 0, "seconds": 0.0}
        )
        tags = {child.tag for child in case}
        state = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        row[state] += 1
        row["seconds"] += float(case.attrib["time"])
    return found


def failed(known: dict[str, dict[str, float]]) -> bool:
    return any(row["failed"] for row in known.values())


def run(names: tuple[str, ...], record: Path) -> None:
    """A unit of test files, relative to ROOT."""
    partial = record.with_suffix(".partial")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu and not families", f"--junitxml={partial}", *names]
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
        of = documents if unit[0].startswith("tests/docs/") else ""
        others = hashlib.sha256(" ".join((*unit[1:], of)).encode()).hexdigest()[:12]
        records[unit] = folder / f"{unit[0].replace('/', '.')}.{others}.xml"
    left = [unit for unit, record in records.items() if (known := counts(record)) is None or failed(known)]
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
    return int(not results or failed(results))


def units(names: list[str]) -> list[tuple[str, ...]]:
    """What one pytest runs: files that share a server, some short ones of a folder, every other by itself."""
    sharing = tuple(name for name in SHARING if name in names)
    found = [sharing] if sharing else []
    for folder, group in itertools.groupby(
        (name for name in names if name not in sharing), key=lambda name: name.rpartition("/")[0]
    ):
        own = [name for name in group if name not in ALONE]
        size = CHUNK if folder in SHORT else 1
        found += [tuple(own[start : start + size]) for start in range(0, len(own), size)]
    return found + [(name,) for name in names if name in ALONE]


def write(records: dict[tuple[str, ...], Path], code: str) -> dict[str, dict[str, float]]:
    """The table of all test files of units that have ended, which it returns."""
    ended = [known for record in records.values() if (known := counts(record)) is not None]
    results = dict(sorted((name, row) for known in ended for name, row in known.items()))
    (RESULTS / "results.md").write_text(table(results, code))
    return results


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted: call it again to go on from here")
    except BrokenOffError as error:
        sys.exit(str(error))
