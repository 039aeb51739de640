"""lm-eval's command with d2moe checkpoints known to transformers: `python -m d2moe_vllm.hf.lm_eval run --model hf ...`.

lm-eval looks up a checkpoint's quantization method before it runs any code of the checkpoint, so that
trust_remote_code=True alone comes too late. Arguments, output and exit status are lm-eval's own.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
