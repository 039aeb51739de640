"""`make audit`: known vulnerabilities of every pinned version, asked of OSV (https://osv.dev) by pip-audit.

Nothing is installed, and the markers of the locks hold for this machine. Exit codes: 0 none known, 1 some are, 2 the
service could not be asked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).resolve().parent


class UnreachableError(Exception):
    """The service gave no answer; the message is the last line of what pip-audit said."""


def audit(lock: Path, options: list[str]) -> list[dict[str, Any]]:
    """Every package of a lock: name, version, and vulns (id, fix_versions). Raises UnreachableError."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", "osv", "--no-deps", "--disable-pip"]
        command += ["--progress-spinner", "off", "--format", "json", "--output", str(answer), "-r", str(lock), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # It ends with 1 both where something is known and where it was interrupted: only an answer tells.
        if not answer.exists():
            raise UnreachableError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return json.loads(answer.read_text())["dependencies"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("locks", nargs="*", type=Path, default=sorted(DEPLOY.glob("*/constraints.txt")))
    parser.add_argument("--osv-url", help="another address of OSV's interface")
    arguments = parser.parse_args()
    known = 0
    for lock in arguments.locks:
        try:
            packages = audit(lock, ["--osv-url", arguments.osv_url] if arguments.osv_url else [])
        except UnreachableError as reason:
            print(f"audit: OSV could not be asked about {lock}, so nothing is known: {reason}", file=sys.stderr)
            return 2
        skipped = [package["name"] for package in packages if "skip_reason" in package]
        found = [(package, vuln) for package in packages for vuln in package.get("vulns", ())]
        for package, vuln in found:
            mended = ", ".join(vuln["fix_versions"]) or "no release yet"
            print(f"{package['name']} {package['version']}: {vuln['id']}, mended in {mended}")
        print(f"{lock}: {len(packages) - len(skipped)} packages asked about, {len(found)} known vulnerabilities")
        if skipped:
            print(f"{lock}: not asked about: {', '.join(skipped)}")
        known += len(found)
    return 1 if known else 0


if __name__ == "__main__":
    sys.exit(main())
