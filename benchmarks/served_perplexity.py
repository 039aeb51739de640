"""Perplexity of a checkpoint as `vllm serve` computes it, by backend: what one costs that rounds rows to 8 bits.

One server after the other, the same windows of the text; a window's first token is context only. A table on stdout,
beside it what each backend said of itself at loading.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
from pathlib import Path

from openai import OpenAI
from transformers import AutoTokenizer

from offline.compare.server import Server


def perplexity(model: Path, backend: str, windows: list[list[int]], folder: Path) -> tuple[float, str]:
    """And how far off the backend said it is, "" where it said nothing."""
    log = folder / f"{backend}.log"
    chosen = json.dumps({"d2moe": {"backend": backend}})
    length = len(windows[0])
    options = ["--max-model-len", str(length + 1), "--additional-config", chosen, "--enforce-eager"]
    total = 0.0
    with Server(model, options, log=log, env={"VLLM_CPU_KVCACHE_SPACE": "1"}, timeout=1800) as server:
        client = OpenAI(base_url=server.base_url, api_key="none", timeout=1800)
        for window in windows:
            reply = client.completions.create(
                model=str(model), prompt=window, max_tokens=1, temperature=0, echo=True, logprobs=0
            )
            found = reply.choices[0].logprobs
            assert found is not None
            assert found.token_logprobs is not None
            # Without the first, of which nothing is said, and the one that was asked for.
            total -= sum(value for value in found.token_logprobs[1:length] if value is not None)
    said = re.search(r"by ([\d.]+) % \(root mean square\)", log.read_text(encoding="utf-8", errors="replace"))
    return math.exp(total / (len(windows) * (length - 1))), "" if said is None else f"{said[1]} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--backends", nargs="+", default=["cpu", "cpu-int8"])
    given = parser.parse_args()
    text = given.text.read_text(encoding="utf-8")
    # As many characters as the windows may want: tokens are hardly longer.
    tokens = AutoTokenizer.from_pretrained(given.model)(text[: 16 * given.windows * given.seq_len])["input_ids"]
    count = min(given.windows, len(tokens) // given.seq_len)
    if not count:
        parser.error(f"{given.text} has {len(tokens)} tokens, fewer than one window of {given.seq_len}")
    windows = [tokens[i * given.seq_len : (i + 1) * given.seq_len] for i in range(count)]
    print("| backend | perplexity | against the first | a random token, first layer |\n|---|---:|---:|---:|")
    first = None
    with tempfile.TemporaryDirectory() as folder:
        for backend in given.backends:
            found, off = perplexity(given.model, backend, windows, Path(folder))
            first = first or found
            print(f"| `{backend}` | {found:.4f} | {100 * (found / first - 1):+.2f} % | {off} |", flush=True)


if __name__ == "__main__":
    main()
