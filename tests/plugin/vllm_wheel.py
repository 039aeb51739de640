"""The Python source of a release of vLLM that is not installed, read out of its wheel without downloading it whole.

The wheel is the CUDA build, hundreds of MB. pip says where it is and how to get there (index, proxy, certificates,
credentials: all as pip is configured) and reads the parts of it that are asked for, as it does for a wheel's metadata.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from contract import CONTRACT
from vllm_views import MissingError, Source

ROOT = Path(__file__).resolve().parents[2]
UNAVAILABLE = 3


class UnavailableError(Exception):
    """Why the source cannot be had here; a test that needs it is skipped with this."""


def other_release(version: str) -> Source:
    """A release's source, as far as the contract needs it; kept in build/, so that a second run needs no network.

    Raises UnavailableError.
    """
    # In a process of its own: pip is not made to be imported beside other packages.
    done = subprocess.run([sys.executable, __file__, version], capture_output=True, text=True, check=False)
    if done.returncode == UNAVAILABLE:
        raise UnavailableError(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    return Source(VllmWheel(version).read)


class VllmWheel:
    def __init__(self, version: str, remote: ExitStack | None = None) -> None:
        """remote: holds what is open of the remote file; without it nothing is fetched."""
        self.version, self._remote = version, remote
        self.folder = ROOT / "build" / f"vllm-{version}"
        self._wheel: ZipFile | None = None

    def read(self, module: str) -> tuple[str, bool] | None:
        """(source, whether it is a package's __init__) of "vllm.config"; None where there is no such module."""
        path = module.replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            if name in self._names():
                return self._text(name), name.endswith("/__init__.py")
        return None

    def _names(self) -> frozenset[str]:
        listing = self.folder / "names.txt"
        if not listing.exists():
            self._write(listing, "\n".join(name for name in self._open().namelist() if name.endswith(".py")))
        return frozenset(listing.read_text().splitlines())

    def _text(self, name: str) -> str:
        file = self.folder / name
        if not file.exists():
            self._write(file, self._open().read(name).decode())
        return file.read_text()

    @staticmethod
    def _write(file: Path, text: str) -> None:
        # Whole or not at all: an interrupted run must not leave a part of a file in the cache.
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(file.name + ".part")
        part.write_text(text)
        part.replace(file)

    def _open(self) -> ZipFile:
        if self._wheel is None:
            assert self._remote is not None, "the contract needs a file that was not fetched"
            self._wheel = self._remote.enter_context(ZipFile(self._remote_file(self._remote)))
        return self._wheel

    def _remote_file(self, stack: ExitStack) -> Any:
        # pip has no command for this; these are the parts of it behind `pip index` and `--use-feature=fast-deps`.
        try:
            from pip._internal.cli.cmdoptions import make_target_python
            from pip._internal.commands import create_command
            from pip._internal.network.lazy_wheel import HTTPRangeRequestUnsupported, LazyZipOverHTTP
        except ImportError as error:
            raise UnavailableError(f"this Python's pip cannot read parts of wheels: {error}") from None
        command: Any = create_command("index")
        options, _ = command.parse_args(["versions", "vllm", "--retries", "1", "--timeout", "20"])
        stack.enter_context(command.main_context())
        session = command._build_session(options)
        target = make_target_python(options)
        finder = command._build_package_finder(options=options, session=session, target_python=target)
        links = [found.link for found in finder.find_all_candidates("vllm") if str(found.version) == self.version]
        wheels = [link for link in links if link.is_wheel]
        if not wheels:
            raise UnavailableError(f"pip finds no wheel of vllm {self.version}: no network, or none for this platform")
        if wheels[0].is_file:
            return wheels[0].file_path
        try:
            return stack.enter_context(LazyZipOverHTTP(wheels[0].url_without_fragment, session))
        except HTTPRangeRequestUnsupported:
            raise UnavailableError("the package index does not serve parts of files") from None


def main(version: str) -> None:
    with ExitStack() as stack:
        source = Source(VllmWheel(version, stack).read)
        try:
            for use in CONTRACT:
                with suppress(MissingError):
                    source(use.name)
        except UnavailableError as error:
            print(error)
            sys.exit(UNAVAILABLE)


if __name__ == "__main__":
    main(sys.argv[1])
