"""The model card that every checkpoint gets, with the Hub's metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from d2moe_vllm.format.words import describe
from offline.errors import InputError
from offline.io.shards import write_file
from offline.plan.budget import Budget
from offline.plan.plan import Plan
from offline.source.folder import is_repository

MEASURED = ("<!-- measured -->", "<!-- /measured -->")
"""Between these lines of a card are perplexities that `d2moe report --card` measured."""
_PLACE = f"{re.escape(MEASURED[0])}.*?{re.escape(MEASURED[1])}"

TEMPLATE = """---
{metadata}---

# {name}, compressed by {method} to {kept:.1f} % of its size

> **Plain transformers:** load it with `trust_remote_code=True`, or after `import d2moe_vllm.hf`. With neither,
> transformers prints one warning ("Unknown quantization type") and gives you **randomly initialised experts**.

| | original | this checkpoint |
|---|---|---|
| parameters | {source_parameters:,} | {parameters:,} |
| bytes on disk | {source_bytes:,} | {bytes:,} |

Made by d2moe-vllm: {made}
Stored: {stores}.
Everything but the experts is unchanged{left_out}.

To serve it, install d2moe-vllm from a checkout of its repository:

```sh
pip install -e '.[serve]'   # in the checkout
vllm serve <this folder or repository> --trust-remote-code
```

In plain transformers, without d2moe-vllm:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("<this folder or repository>", trust_remote_code=True)
assert type(model).__name__.startswith("D2")
```

## Recipe and results

{recipe}, calibrated on {windows} windows of {seq_len} tokens (SHA-256 of the tokens {digest}).
All settings: `d2moe_recipe.yaml`; routing counts and errors per layer and expert: `d2moe_stats.json`. At a glance:
`d2moe inspect <this folder>`; as a page with figures: `d2moe report <this folder> report.html`.

| relative error of the experts on the calibration text | gate | up | down |
|---|---:|---:|---:|
| mean | {means} |
| worst expert | {worsts} |

{start}
Perplexity: not measured. `d2moe report <this folder> report.html --text FILE --source <original> --card` puts it here.
{end}
"""


def model_card(plan: Plan, budget: Budget, statistics: Mapping[str, Any]) -> str:
    """README.md of the checkpoint; licence and language are carried over from the source's card.

    statistics: the content of d2moe_stats.json.
    """
    source = plan.config.source
    metadata: dict[str, object] = {
        **({"base_model": source.name, "base_model_relation": "quantized"} if is_repository(source.name) else {}),
        "library_name": "vllm",
        "pipeline_tag": plan.model.family.pipeline,
        "tags": ["d2moe", "moe", "compressed", "vllm"],
    }
    carried = source_metadata(plan.model.folder).items()
    metadata |= {key: value for key, value in carried if key.startswith("licen") or key == "language"}
    reports = statistics["layers"].values()
    errors = [[error for report in reports for error in report["relative_error"][role]] for role in plan.config.roles]
    return TEMPLATE.format(
        method=plan.method.title,
        made=plan.layers.made(plan),
        stores=describe(budget.config),
        left_out=f", but {_names(plan.model.homeless)}, which the model has no place for"
        if plan.model.homeless
        else "",
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        name=source.name,
        kept=100 * budget.nbytes / source.bytes,
        source_parameters=source.parameters,
        source_bytes=source.bytes,
        parameters=budget.parameters,
        bytes=budget.nbytes,
        recipe=f"Ratio {plan.recipe.ratio:g} ({plan.recipe.accounting}){plan.layers.recipe_line(plan)}",
        windows=statistics["calibration"]["windows"],
        seq_len=statistics["calibration"]["seq_len"],
        digest=statistics["calibration"]["tokens_sha256"],
        means=" | ".join(f"{sum(values) / len(values):.4f}" for values in errors),
        worsts=" | ".join(f"{max(values):.4f}" for values in errors),
        start=MEASURED[0],
        end=MEASURED[1],
    )


def _names(tensors: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(tensors))


def source_metadata(folder: Path) -> dict[str, object]:
    """The YAML front matter of a model card, or nothing where there is no readable one."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    match = re.match(
        r"---\n(.*?)\n---[ \t]*(?:\n|$)", card.read_text(encoding="utf-8-sig", errors="replace"), re.DOTALL
    )
    try:
        content = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def check_card(folder: Path) -> str:
    """The checkpoint's card. Raises InputError where it has no place for measured figures."""
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); leave --card out") from None
    if text.count(MEASURED[0]) != 1 or text.count(MEASURED[1]) != 1 or not re.search(_PLACE, text, re.DOTALL):
        raise InputError(f"{path} has no line {MEASURED[0]} followed by {MEASURED[1]}: add both, or leave --card out")
    return text


def record(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put measured perplexities into the checkpoint's card, in place of those that were there.

    rows: as `d2moe report` measures them. The card is not in the manifest, so the checkpoint stays sound.
    """
    lines = ["| text | tokens | original | this checkpoint |", "|---|---:|---:|---:|"]
    for row in rows:
        before = "not measured" if row["before"] is None else f"{row['before']:.2f}"
        name = str(row["text"]).replace("|", "\\|")
        lines.append(f"| {name} | {row['tokens']:,} | {before} | {row['after']:.2f} |")
    lengths = ", ".join(sorted({str(row["seq_len"]) for row in rows}, key=int))
    lines += ["", f"Perplexity over windows of {lengths} tokens, float32, measured by `d2moe report`."]
    content = "\n".join([MEASURED[0], *lines, MEASURED[1]])
    write_file(folder / "README.md", re.sub(_PLACE, lambda _: content, check_card(folder), flags=re.DOTALL))
