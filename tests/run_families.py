"""`make families`: every command, transformers and vLLM over every family's small model; the table in docs/methods.md.

One pytest for each family. What it found is kept in docs/families.json, with the versions that it was found with; a
family that has all of its cells with the installed versions is not run again. Arguments are families (default: all),
`--again` runs them whatever is known, `--print` writes the table from what is known and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from measuring import put_tables
from places import ROOT, commit
from small_families import SMALL

from offline.io.shards import write_file
from offline.source.families import FAMILIES

RESULTS = ROOT / "docs" / "families.json"
PAGE = ROOT / "docs" / "methods.md"
PACKAGES = ("vllm", "transformers", "torch")
MATRIX = "tests/offline/test_matrix.py::test_every_method_in_every_family"
FAMILY, SERVED = "tests/offline/test_families.py::", "tests/plugin/test_families_served.py::"
COMMANDS = ("plan", "compress", "verify", "inspect", "export", "eval")
"""Each a column: the tests of MATRIX say which of them they came through."""
COLUMNS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(COMMANDS, (f"{MATRIX}[{{}}-uniform]", f"{MATRIX}[{{}}-default]")),
    "transformers": (
        f"{FAMILY}test_reads_and_runs_as_the_stock_model_does[{{}}]",
        f"{FAMILY}test_gradients_are_the_stock_models[{{}}]",
        f"{FAMILY}test_compressed_without_loss_it_is_the_same_model[{{}}]",
    ),
    "vLLM = transformers": (f"{SERVED}test_stock_vllm_serves_what_transformers_computes[{{}}]",),
    "vLLM, 16 bits": (f"{SERVED}test_served_as_the_dense_reconstruction[{{}}]",),
    "4 bits, unequal widths": (
        "tests/plugin/test_methods_served.py::test_few_bits_and_unequal_widths_in_every_family[{}]",
    ),
    "TP 2": (f"{SERVED}test_on_two_tensor_parallel_ranks[{{}}]",),
    "EP 2": (f"{SERVED}test_on_two_expert_parallel_ranks[{{}}]",),
}
"""Column -> the tests that have to pass, {} for the family."""
REFUSED = f"{SERVED}test_refused_where_vllms_cpu_backend_serves_nothing_or_another_model[{{}}]"
"""Of a family that vLLM does not serve on this machine: what takes the place of all columns that serve it."""
NOWHERE = f"{SERVED}test_served_as_transformers_computes_where_stock_vllm_serves_nothing[{{}}-plain-{{}}]"
ALONE: Mapping[str, Sequence[str]] = {
    "vLLM = transformers": (f"{SERVED}test_what_stock_vllm_has_no_kernel_for_on_cpus_stays_refused[{{}}]",),
    "vLLM, 16 bits": (NOWHERE.format("{}", "one rank"),),
    "4 bits, unequal widths": (
        "tests/plugin/test_methods_served.py::test_served_as_transformers_computes_the_export[{}-few-bits]",
    ),
    "TP 2": (NOWHERE.format("{}", "two tensor-parallel ranks"),),
    "EP 2": (NOWHERE.format("{}", "two expert-parallel ranks"),),
}
"""The same of a family that stock vLLM does not serve on CPUs, and our plugin does: held against transformers."""
SERVING = tuple(COLUMNS)[len(COMMANDS) + 1 :]


def installed() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def tests_of(family: str) -> dict[str, list[str]]:
    """Column -> node ids."""
    columns = {**COLUMNS, **ALONE} if SMALL[family].ours_alone else dict(COLUMNS)
    if SMALL[family].refused_here:
        columns |= dict.fromkeys(SERVING, (REFUSED,))
    return {column: [one.format(family) for one in tests] for column, tests in columns.items()}


def measure(family: str) -> dict[str, Any]:
    """What is kept of a family: its cells, and when, of which commit and in how many seconds they were run. Raises
    SystemExit where pytest ends without a result."""
    started = time.monotonic()
    nodes = list(dict.fromkeys(node for nodes in tests_of(family).values() for node in nodes))
    with tempfile.TemporaryDirectory(prefix="d2moe-families-") as folder:
        record = Path(folder) / "record.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={record}", *nodes]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{done.stdout}{done.stderr}pytest ended with exit code {done.returncode}")
        found = read_record(record)
    if done.returncode:
        print(done.stdout, file=sys.stderr, flush=True)
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "seconds": round(time.monotonic() - started),
        "versions": installed(),
        "cells": cells_of(family, found),
    }


class Case:
    """How a test ended: passed, skipped or failed; why, where it was skipped; the commands that it came through."""

    def __init__(self, case: ElementTree.Element) -> None:
        tags = {child.tag for child in case}
        self.state = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        skipped = case.find("skipped")
        self.why = "" if skipped is None else skipped.attrib.get("message", "")
        self.commands = {one.attrib["value"] for one in case.iter("property") if one.attrib["name"] == "command"}


def read_record(record: Path) -> dict[str, Case]:
    """Node id -> how it ended, of a JUnit file."""
    found = {}
    for case in ElementTree.parse(record).iter("testcase"):
        file = case.attrib["classname"].replace(".", "/")
        found[f"{file}.py::{case.attrib['name']}"] = Case(case)
    return found


def cells_of(family: str, found: Mapping[str, Case]) -> dict[str, str]:
    """Column -> passed, refused, failed, or why it was skipped. What was not run failed."""
    cells, refused = {}, {one.format(family) for one in (REFUSED, *ALONE["vLLM = transformers"])}
    for column, nodes in tests_of(family).items():
        cases = [found.get(node) for node in nodes]
        if column in COMMANDS:
            passed = all(case is not None and column in case.commands for case in cases)
            cells[column] = "passed" if passed else "failed"
        elif any(case is None or case.state == "failed" for case in cases):
            cells[column] = "failed"
        elif skipped := next((case for case in cases if case and case.state == "skipped"), None):
            cells[column] = f"skipped: {skipped.why}"
        else:
            cells[column] = "refused" if any(node in refused for node in nodes) else "passed"
    return cells


def is_known(family: str, results: Mapping[str, Any]) -> bool:
    """Whether a family has all of its cells, by the installed versions, and none of them failed."""
    known = results.get(family)
    return (
        known is not None
        and known["versions"] == installed()
        and list(known["cells"]) == list(COLUMNS)
        and "failed" not in known["cells"].values()
    )


MARKS = {"passed": "yes", "refused": "refused", "failed": "**no**"}


def table(results: Mapping[str, Any]) -> str:
    """Of all families; what was not run is told."""
    lines = [f"| `model_type` | {' | '.join(COLUMNS)} | run |", f"|---|{'---|' * (len(COLUMNS) + 1)}"]
    notes: list[str] = []
    for family in FAMILIES:
        known = results.get(family)
        if known is None:
            lines.append(f"| `{family}` |{' |' * len(COLUMNS)} not yet |")
            continue
        cells = []
        for column in COLUMNS:
            cell = known["cells"].get(column, "not run")
            if cell.startswith("skipped: "):
                notes += [] if (why := cell.removeprefix("skipped: ")) in notes else [why]
                cell = f"skipped ({notes.index(why) + 1})"
            cells.append(MARKS.get(cell, cell))
        lines.append(f"| `{family}` | {' | '.join(cells)} | {known['date']} |")
    versions = {", ".join(f"{name} {one}" for name, one in known["versions"].items()) for known in results.values()}
    said = [f"With {'; '.join(sorted(versions))}." if versions else "Not run yet."]
    said += [f"({number}) {why}." for number, why in enumerate(notes, start=1)]
    return "\n".join([*lines, "", *said])


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model_types; all by default")
    parser.add_argument("--again", action="store_true", help="run what is known too")
    parser.add_argument("--print", action="store_true", help="write the table from what is known, and run nothing")
    options = parser.parse_args(arguments)
    if strange := [name for name in options.families if name not in FAMILIES]:
        parser.error(f"{strange[0]!r} is no family; there are {', '.join(FAMILIES)}")
    names = [name for name in FAMILIES if name in (options.families or FAMILIES)]
    left = [] if options.print else [name for name in names if options.again or not is_known(name, load())]
    for number, family in enumerate(left, start=1):
        print(f"{number}/{len(left)} {family}", flush=True)
        found = measure(family)
        # Read anew: another run may have added families of its own meanwhile.
        results = {**load(), family: found}
        ordered = {name: results[name] for name in FAMILIES if name in results}
        write_file(RESULTS, json.dumps(ordered, indent=1) + "\n")
        cells = ", ".join(f"{column} {cell}" for column, cell in found["cells"].items() if cell != "passed")
        print(f"  {found['seconds']} s: {cells or 'all passed'}", flush=True)
        put_tables(PAGE, {"families": table(ordered)})
    results = load()
    put_tables(PAGE, {"families": table(results)})
    print(f"table written to {PAGE.relative_to(ROOT)}")
    return int(any("failed" in results[name]["cells"].values() for name in names if name in results))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted: call it again to go on from here")
