"""The `d2moe` command: one thin file a command."""

from offline.cli.app import main

__all__ = ["main"]
