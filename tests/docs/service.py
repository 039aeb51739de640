"""A server that is started by a command line of a document."""

from __future__ import annotations

import shlex
from pathlib import Path

from offline.compare.server import Server


class DocumentedServer(Server):
    """Runs `vllm serve ...` as it is written, in the reader's folder, but for the port, and eager.

    Compiled servers have tests of their own in tests/serve.
    """

    def __init__(self, command: str, folder: Path, log: Path) -> None:
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        super().__init__(folder, log=log, env=environment)
        scripts = Path(self.command[0]).parent
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"]
        script = f"cd {shlex.quote(str(folder))} && PATH={shlex.quote(str(scripts))}:$PATH exec env {command}"
        self.command = ["bash", "-c", f"{script} {shlex.join(options)}"]
