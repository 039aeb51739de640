"""D2-MoE (METHODS 1): a shared base and deltas, which is what a `Method` does by default."""

from __future__ import annotations

from offline.methods.base import Method

D2 = Method(
    name="d2",
    title="D2-MoE",
    made="per MoE layer one shared, column-pruned base, per expert a low-rank delta (D2-MoE, arXiv 2502.17298).",
    hint=" or a higher base.sparsity",
    until="These are uniform ranks and one kind of base; calibration decides them layer by layer, in no more bytes.",
)
