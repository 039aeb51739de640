"""What expert pruning and merging write, served by vLLM without our plugin."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compression import TINY
from engine import PROMPTS, generate
from families import write_family
from transformers import AutoModelForCausalLM, AutoTokenizer

from offline.compare.baselines import write_fewer
from offline.io.progress import Steps
from offline.run.usage import Usage
from offline.source.dense import open_dense

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("family", "name", "experts"), [("mixtral", "merge", 5), ("granitemoe", "frequency", 5)])
@torch.no_grad()
def test_stock_vllm_serves_it(family: str, name: str, experts: int, tmp_path: Path) -> None:
    """The prompts' log-probabilities are transformers' own, float32."""
    source = TINY if family == "mixtral" else write_family(tmp_path / "source", family, dtype=torch.float32)
    model = open_dense(str(source))
    count = torch.arange(1.0, model.shape.num_experts + 1, dtype=torch.float64)
    usage = dict.fromkeys(model.shape.layers, Usage(count, count))
    write_fewer(model, name, experts, usage, tmp_path / "fewer", Steps(10))
    served = generate(
        tmp_path / "run", tmp_path / "fewer", {"VLLM_PLUGINS": ""}, job={"max_tokens": 1},
        dtype="float32", enforce_eager=True, trust_remote_code=False,
    )  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "fewer")
    for prompt, result in zip(PROMPTS, served, strict=True):
        ids = torch.tensor([result["prompt_ids"]])
        assert ids.tolist() == tokenizer(prompt, return_tensors="pt")["input_ids"].tolist()
        expected = stock(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result["prompt_logprobs"]), expected, rtol=0, atol=1e-4)
