"""The tests of transformers that cannot apply to compiled models, each with the reason."""

from __future__ import annotations

import re

BOTH = ("exact", "sparse")
# A pattern for the name of a test, the modes in which the test cannot apply, and why.
CANNOT_APPLY: list[tuple[str, tuple[str, ...], str]] = [
    ("compile|compilation|executorch|export", BOTH, "it compiles the model by itself, and counts how often"),
    ("capture_outputs_decorator", BOTH, "it counts calls of a Python function of transformers, which a graph does not make"),
    ("mismatching_num_image_tokens", BOTH, "it expects a ValueError, for which transformers has torch._check in graphs"),
]


def reason_against(name: str, mode: str) -> str:
    """Why the test ``name`` cannot apply in ``mode``; empty if it can."""
    return next((why for pattern, modes, why in CANNOT_APPLY if mode in modes and re.search(pattern, name)), "")
