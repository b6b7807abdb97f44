"""Refuse what the plug-in does not do before vLLM builds a model: one error with the rule, the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")


def check_config(config: Any) -> None:
    """Raise ``ValueError`` for the first setting of a ``VllmConfig`` that does not work with a policy."""
    for wrong in (*_models(config.model_config), *_parallelism(config.parallel_config), *_cache(config)):
        raise ValueError(f"a policy of sparse_compile inside vLLM {wrong}")


def _models(model: Any) -> Iterator[str]:
    name = ", ".join(getattr(model.hf_config, "architectures", None) or [type(model.hf_config).__name__])
    remedy = f"leave sparse_compile out of additional_config for {name}"
    if model.runner_type != "generate" or model.is_encoder_decoder:
        yield f"needs a decoder that generates, got {name} with runner {model.runner_type!r}: {remedy}"
    if model.use_mla:
        yield f"needs keys and values for each head, but {name} caches latent vectors (MLA): {remedy}"
    if model.is_attention_free or model.is_hybrid:
        yield f"needs attention in every layer, but {name} has layers with a state (Mamba and the like): {remedy}"
    if model.is_mm_prefix_lm:
        yield f"needs causal attention, but {name} lets the tokens of an image see each other: {remedy}"


def _parallelism(parallel: Any) -> Iterator[str]:
    for what, flag, size in (
        ("decode context", "--decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("prefill context", "--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
        ("pipeline", "--pipeline-parallel-size", parallel.pipeline_parallel_size),
    ):
        if size > 1:
            yield f"runs without {what} parallelism, got {flag} {size}: use --tensor-parallel-size"


def _cache(config: Any) -> Iterator[str]:
    if config.speculative_config is not None:
        yield "runs without speculative decoding, got a --speculative-config: leave it out"
    if config.cache_config.cache_dtype not in PLAIN_CACHES:
        yield f"reads plain keys and values, got --kv-cache-dtype {config.cache_config.cache_dtype}: use auto"
    if config.kv_transfer_config is not None:
        yield "does not move its cache elsewhere, got a --kv-transfer-config: leave it out"
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield (
            "frees blocks by kind of head, which needs the hybrid KV cache manager, but it is disabled: "
            "leave --disable-hybrid-kv-cache-manager out"
        )
