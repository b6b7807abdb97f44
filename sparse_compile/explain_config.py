"""Explain a model from its config alone, without weights, downloads or computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparse_compile.api import planner
from sparse_compile.head_profile import Profile
from sparse_compile.masks.optional_packages import needed
from sparse_compile.passes.torch_private import fake_tensors
from sparse_compile.policy import Policy
from sparse_compile.policy_argument import policy_of
from sparse_compile.report import Report


def explain_config(config: Path, policy: Policy | Profile | None, batch: int, tokens: int, device: str) -> Report:
    """Report on a prefill and a decode step of the causal language model that a transformers config describes.

    Half of the KV heads see everything under a profile, as a note in the report says. Raises ``OSError`` or ``ValueError`` if
    ``config`` is not a config, ``ValueError`` for a profile of another model, and ``ImportError`` without transformers.
    """
    with needed("explain", "transformers"):
        from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

        from sparse_compile.cache.sparse_cache import SparseCache
    if not config.exists():
        raise ValueError(f"explain needs a config.json or a directory that holds one, but there is none at {config}")
    settings = AutoConfig.from_pretrained(config)
    note = ""
    if isinstance(policy, Profile):
        policy.check(settings)
        policy, note = policy_of(policy)
    with fake_tensors(allow_real_inputs=True), torch.no_grad():  # shapes alone decide what the passes do
        factory: Any = AutoModelForCausalLM
        model: torch.nn.Module = factory.from_config(settings).eval()
        prompt = torch.zeros(batch, tokens, dtype=torch.int64)
        backend = planner(policy, model, device)
        compiled: Any = torch.compile(model, backend=backend)
        sparse = policy is not None and policy.selects()
        cache: Any = (
            SparseCache(settings, policy, max_length=tokens + 1, max_batch=batch) if sparse else DynamicCache(config=settings)
        )
        compiled(prompt, past_key_values=cache)
        compiled(prompt[:, :1], past_key_values=cache)
    if note:
        backend.report_note(note)
    return backend.report
