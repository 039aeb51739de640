"""Runs the stages of the Dockerfile without a Docker engine: the very RUN lines, at their own absolute paths.

A stage's root is this machine's file system under overlays, in a mount namespace of its own: whatever a command writes
lands in the stage's folder, and nothing outside is touched. So the base image is this machine, not the one that FROM
names; what that cannot show is said by the tests. Needs root, as CI has it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dockerfile import ROOT, Stage, assignments, mounts, put_in, stages

PASSED_ON = ("PIP_", "UV_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy", "REQUESTS_CA")
"""How this machine reaches its package index; nothing else of the environment is handed on."""
OVERLAID = {"etc", "home", "opt", "root", "srv", "usr", "var", "bin", "sbin", "lib", "lib32", "lib64", "libx32"}
"""What a container has at the top of its file system, beside the folder that this Python is in."""
SHARED = ("dev", "sys", "run")
PYTHONS = (Path(sys.base_prefix), Path(sys.prefix).resolve())
"""This Python's own installation, and the virtual environment that the tests run in."""


def impossible() -> str | None:
    """Why this machine cannot rehearse; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "rehearsing the Dockerfile takes root on Linux (mount namespaces), as in CI"
    if missing := [tool for tool in ("unshare", "chroot", "ip") if not shutil.which(tool)]:
        return f"rehearsing the Dockerfile takes {', '.join(missing)} (util-linux, coreutils, iproute2)"
    command = ["unshare", "--mount", "--pid", "--net", "--fork", "true"]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


def context(to: Path) -> Path:
    """What `docker build` would be sent: the paths that .dockerignore lets through."""
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            source, target = ROOT / line[1:], to / line[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
            else:
                shutil.copy(source, target)
    return to


class Image:
    """A stage's file system: `layer/` holds what it wrote into this machine's folders, `root/` what is new."""

    def __init__(self, folder: Path, parent: Image | None = None) -> None:
        self.folder, self.parent = folder, parent
        self.env: dict[str, str] = dict(parent.env) if parent else _environment()
        self.root, self.layer = folder / "root", folder / "layer"
        if parent:
            shutil.copytree(parent.root, self.root, symlinks=True)
        wanted = [path for path in Path("/").iterdir() if path.name in OVERLAID | {p.parts[1] for p in PYTHONS}]
        self.tops = [path.name for path in wanted if not path.is_symlink()]
        if folder.parts[1] in self.tops:  # an overlay cannot hold its own layers
            raise ValueError(f"{folder}: rehearse in a folder outside of {', '.join(self.tops)}, such as /tmp")
        for name in [*self.tops, *SHARED, "proc", "tmp"]:
            for above in (self.root, self.layer, folder / "work"):
                (above / name).mkdir(parents=True, exist_ok=True)
        for path in wanted:
            if path.is_symlink() and not (self.root / path.name).is_symlink():
                (self.root / path.name).symlink_to(os.readlink(path))
        (self.root / "tmp").chmod(0o1777)

    def layers(self) -> list[Path]:
        """This stage's and those it builds on, the newest first."""
        return [self.layer, *(self.parent.layers() if self.parent else [])]

    def path(self, inside: str) -> Path:
        """Of a folder that a stage made at the top of its file system, such as /wheels."""
        return self.root / inside.lstrip("/")

    def run(
        self,
        command: str,
        *,
        user: str = "0:0",
        binds: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
        env: Mapping[str, str] | None = None,
        read_only: Sequence[str] | None = None,
        network: bool = True,
        cwd: str = "/",
        timeout: float = 900,
    ) -> subprocess.CompletedProcess[str]:
        """A shell command inside. binds: target -> folder outside, mounted read-only; writable: the same to write to.

        read_only: the root is, but for /tmp and these folders, each a fresh tmpfs as large as it likes.
        network False: only a loopback interface of its own, on which every port is free.
        """
        script = ["set -e", "mount --make-rprivate /", *self._mount()]
        for target, source in {**(binds or {}), **(writable or {})}.items():
            self.path(target).mkdir(parents=True, exist_ok=True)
            script += [f"mount --bind {shlex.quote(str(source))} {self.path(target)}"]
            script += [f"mount -o remount,bind,ro {self.path(target)}"] if target in (binds or {}) else []
        if read_only is not None:
            script += [f"mount -t tmpfs -o mode=1777 tmpfs {self.path(folder)}" for folder in ("/tmp", *read_only)]
            script += [f"mount -o remount,ro {self.root / name}" for name in self.tops]
            script += [f"mount -o remount,bind,ro {self.root}"]
        if not network:
            script += ["ip link set lo up"]
        inside = f"umask 022; cd {shlex.quote(cwd)}; {command}"
        script += [f"exec chroot --userspec={user} --groups= {self.root} /bin/sh -ec {shlex.quote(inside)}"]
        # With its own process numbers, so that whatever it leaves running ends with it.
        unshare = ["unshare", "--mount", "--pid", *([] if network else ["--net"]), "--fork", "--kill-child"]
        return subprocess.run(
            [*unshare, "bash", "-c", "\n".join(script)],
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )

    def _mount(self) -> list[str]:
        lines = [f"mount --bind {self.root} {self.root}"]
        for name in self.tops:
            lower = ":".join([*(str(layer / name) for layer in self.layers()[1:]), f"/{name}"])
            options = f"lowerdir={lower},upperdir={self.layer / name},workdir={self.folder / 'work' / name}"
            lines.append(f"mount -t overlay overlay -o {shlex.quote(options)} {self.root / name}")
        lines += [f"mount --rbind /{name} {self.root / name}" for name in SHARED]
        return [*lines, f"mount -t proc proc {self.root / 'proc'}"]


def _environment() -> dict[str, str]:
    handed_on = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    path = f"{sys.base_prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {**handed_on, "PATH": path, "HOME": "/root", "LANG": "C.UTF-8"}


class Builder:
    """Stages by name, each built when it is first asked for.

    bases: stand-ins for images by the stage's name; otherwise this machine as it is.
    instead: gets a RUN line that failed and may name another to run; what it stood for is in `replaced`.
    """

    def __init__(self, folder: Path, instead: Callable[[str], str | None] = lambda line: None) -> None:
        self.folder, self.instead = folder, instead
        self.context = context(folder / "context")
        self.arguments, self.stages = stages()
        self.bases: dict[str, Image] = {}
        self.replaced: list[str] = []
        self._built: dict[str, Image] = {}

    def build(self, name: str) -> Image:
        if name not in self._built:
            stage = self.stages[name]
            base = self.build(stage.base) if stage.base in self.stages else self.bases.get(name)
            image = Image(self.folder / name, base)
            self._follow(stage, image)
            self._built[name] = image
        return self._built[name]

    def _follow(self, stage: Stage, image: Image) -> None:
        arguments: dict[str, str] = {}
        cwd = "/"
        for keyword, rest in stage.instructions:
            values = {**self.arguments, **image.env, **arguments}
            if keyword == "ARG":
                arguments |= assignments(rest, values)
            elif keyword == "ENV":
                image.env |= assignments(rest, values)
            elif keyword == "WORKDIR":
                cwd = put_in(rest, values)
                image.path(cwd).mkdir(parents=True)
            elif keyword == "COPY":
                self._copy(image.path(cwd), rest.split())
            elif keyword == "RUN":
                self._run(image, rest, arguments, cwd)

    def _copy(self, cwd: Path, words: list[str]) -> None:
        *sources, target = words
        for source in sources:
            if (self.context / source).is_dir():
                shutil.copytree(self.context / source, cwd / target)
            else:
                shutil.copy(self.context / source, cwd / target)

    def _run(self, image: Image, line: str, arguments: Mapping[str, str], cwd: str) -> None:
        wanted, command = mounts(line)
        binds = {
            mount.target: self.build(mount.stage).path(mount.source) if mount.stage else self.context / mount.source
            for mount in wanted
        }
        done = image.run(command, binds=binds, env=arguments, cwd=cwd)
        if done.returncode and (other := self.instead(command)):
            self.replaced.append(command)
            done = image.run(other, binds=binds, env=arguments, cwd=cwd)
        assert done.returncode == 0, f"RUN {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
