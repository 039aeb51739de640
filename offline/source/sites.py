"""What the projections of an expert read: gate and up the layer's input, down what these two made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from d2moe_vllm.format.kinds import Role

Site = Literal["input", "middle"]
"""Where a projection reads: gate and up from the layer's input, down from the expert's activations."""
SITES: Mapping[Role, Site] = {"gate": "input", "up": "input", "down": "middle"}
SELECTIONS: Mapping[Site, tuple[Role, ...]] = {"input": ("gate", "up"), "middle": ("down",)}
"""Projections that share one selection of base columns, so that one gather feeds both (METHODS 1.2)."""
