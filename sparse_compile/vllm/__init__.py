"""Policies inside vLLM: the plug-in that vLLM loads by the entry point ``vllm.general_plugins``."""

from __future__ import annotations


def register() -> None:
    """Make vLLM follow the policy in ``additional_config``. vLLM calls this in each of its processes, maybe more than once.

        vllm serve MODEL --additional-config '{"sparse_compile": {"policy": "streaming_llm", "sink": 4, "recent": 1020}}'

    ``sparse_compile.vllm.settings.read_settings`` says what the policy may be. Without one, vLLM does what it does without the
    plug-in. With one, anything that cannot be served is a ``ValueError`` when vLLM loads the model, and a version of vLLM that
    is too old is an ``ImportError``. The policies, and what they save, are those of ``SparseCache``.
    """
    from sparse_compile.vllm.loader import register_loaders

    register_loaders()
    try:
        from sparse_compile.vllm.streaming import register_streaming
    except ImportError:  # an older vLLM, which goes on without us; the loaders name the versions if there is a policy
        return
    register_streaming()
