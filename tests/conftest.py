"""Puts tests/ and examples/ on sys.path, for helpers that several test folders share."""

import os
import sys
from pathlib import Path

# As the d2moe command does: threads that wait must sleep, spinning ones starve each other on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]
