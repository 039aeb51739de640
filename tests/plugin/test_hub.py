"""A checkpoint by its Hub id, after `import d2moe_vllm.hf`, from a local stand-in of the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hub
from compression import ROOT


def test_the_manifest_is_fetched_with_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    """transformers fetches the files it knows; without the manifest the checkpoint could not be checked."""
    code = (
        "import d2moe_vllm.hf\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained('someone/tiny')).__name__)\n"
    )
    with hub.serve(checkpoint) as served:
        environment = {**os.environ, "HF_ENDPOINT": served.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "D2MixtralForCausalLM"
    (manifest,) = tmp_path.rglob("d2moe_manifest.json")
    assert manifest.parent.name == hub.COMMIT
