"""The modules of this folder are imported by name, and need vLLM's argument parser."""

import pytest

pytest.importorskip("vllm")
