"""The methods of compression, each an object that declares itself."""

from __future__ import annotations

from collections.abc import Mapping

from offline.errors import InputError
from offline.methods.base import Method
from offline.methods.d2 import D2
from offline.methods.mobe import MOBE
from offline.methods.moe_svd import MOE_SVD

METHODS: Mapping[str, Method] = {method.name: method for method in (D2, MOE_SVD, MOBE)}


def find_method(name: str) -> Method:
    """The method of a checkpoint. Raises InputError for one that is not known here."""
    if name not in METHODS:
        raise InputError(f"method {name!r} is not one of {', '.join(METHODS)}; install a newer d2moe-vllm")
    return METHODS[name]
