"""Policies inside vLLM: the plug-in that vLLM loads by the entry point ``vllm.general_plugins``."""

from __future__ import annotations


def register() -> None:
    """Make vLLM follow the policy in ``additional_config``. vLLM calls this in each of its processes, maybe more than once.

        vllm serve MODEL --additional-config '{"sparse_compile": {"policy": "streaming_llm", "sink": 4, "recent": 1020}}'

    Without ``sparse_compile`` in ``additional_config``, vLLM does what it does without the plug-in.
    """
    from sparse_compile.masks.optional_packages import needed

    with needed("sparse_compile inside vLLM", "vllm"):
        from sparse_compile.vllm.loader import register_loaders
        from sparse_compile.vllm.streaming import register_streaming

    register_streaming()
    register_loaders()
