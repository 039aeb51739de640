"""Runs vllm.LLM in a process of its own: `python llm_runner.py JOB.json`, or `main(JOB.json)`, see engine.py."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from live_storage import live_storage


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    import vllm.v1.executor.multiproc_executor as executor
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    # vLLM's CPU backend insists on spawning its workers, each of which would import vLLM once more.
    executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    settings: dict[str, Any] = {
        "max_model_len": 256,
        "max_num_seqs": 8,
        "trust_remote_code": True,
        "enable_prefix_caching": False,
        **job["llm"],
    }
    llm = LLM(**settings)
    greedy = {"temperature": 0, "max_tokens": job["max_tokens"], "logprobs": 0, "prompt_logprobs": 0}
    sampling = SamplingParams(**{**greedy, **job.get("sampling", {})})
    lora = LoRARequest("adapter", 1, job["lora"]) if "lora" in job else None
    batches = [[prompt] for prompt in job["prompts"]] if job["one_by_one"] else [job["prompts"]]
    batches = job.get("batches", batches)
    if image := job.get("image"):
        from PIL import Image

        seen = Image.open(image)
        batches = [[{"prompt": prompt, "multi_modal_data": {"image": seen}} for prompt in batch] for batch in batches]
    results = []
    for output in (o for batch in batches for o in llm.generate(batch, sampling, use_tqdm=False, lora_request=lora)):
        completion = output.outputs[0]
        results.append(
            {
                "prompt_ids": list(output.prompt_token_ids),
                "cached_tokens": [output.num_cached_tokens],
                "ids": list(completion.token_ids),
                "prompt_logprobs": [next(iter(p.values())).logprob for p in output.prompt_logprobs or () if p],
                "logprobs": [p[t].logprob for p, t in zip(completion.logprobs, completion.token_ids, strict=True)],
            }
        )
    if job.get("storage"):
        results = llm.apply_model(live_storage)
    if job.get("kv_cache"):
        results = {"storage": results, **kv_cache(llm)}
    Path(job["output"]).write_text(json.dumps(results))
    # vLLM takes seconds to shut down in good order, and the caller ends the whole group anyway.
    sys.stdout.flush()
    os._exit(0)


def kv_cache(llm: Any) -> dict[str, Any]:
    """What the engine made of the memory it was given for its KV cache, and what it would need for a request of
    max_model_len tokens; the engine is in this process."""
    core = llm.llm_engine.engine_core.engine_core
    made, config = core.scheduler.kv_cache_config, llm.llm_engine.vllm_config
    groups = made.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    return {
        "memory": config.cache_config.kv_cache_memory_bytes,
        "kinds": sorted({type(spec).__name__ for spec in specs}),
        "block_tokens": sorted({spec.block_size for spec in specs if type(spec).__name__ != "MambaSpec"}),
        "blocks": made.num_blocks,
        # All groups draw from one pool.
        "block_bytes": max(len(group.layer_names) * group.kv_cache_spec.page_size_bytes for group in groups),
        "request_blocks": sum(-(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes) for spec in specs),
        "state_blocks": 2 if config.cache_config.mamba_cache_mode == "align" else 1,
        "batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "concurrent_batches": config.max_concurrent_batches,
    }


if __name__ == "__main__":
    main(sys.argv[1])
