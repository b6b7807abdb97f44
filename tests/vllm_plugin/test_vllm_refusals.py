"""Settings of vLLM that do not work with a policy are refused, each by one error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sparse_compile.vllm.refusals import check_config


def config(**changes: Any) -> Any:
    """A ``VllmConfig`` in the fields that are checked. A change names its field as ``part__field``."""
    parts: dict[str, dict[str, Any]] = {
        "model_config": {
            "hf_config": SimpleNamespace(architectures=["LlamaForCausalLM"]),
            "runner_type": "generate",
            **dict.fromkeys(("is_encoder_decoder", "use_mla", "is_attention_free", "is_hybrid", "is_mm_prefix_lm"), False),
        },
        "parallel_config": dict.fromkeys(
            ("decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"), 1
        ),
        "cache_config": {"cache_dtype": "auto"},
        "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
    }
    whole: dict[str, Any] = {"speculative_config": None, "kv_transfer_config": None}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        (parts[part] if field else whole)[field or part] = value
    return SimpleNamespace(**whole, **{name: SimpleNamespace(**fields) for name, fields in parts.items()})


def test_a_plain_decoder_passes() -> None:
    check_config(config())
    check_config(config(cache_config__cache_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_config__runner_type": "pooling"},
            "needs a decoder that generates, got LlamaForCausalLM with runner 'pooling'",
        ),
        ({"model_config__is_encoder_decoder": True}, "needs a decoder that generates"),
        ({"model_config__use_mla": True}, r"LlamaForCausalLM caches latent vectors \(MLA\): leave sparse_compile out"),
        ({"model_config__is_hybrid": True}, r"has layers with a state \(Mamba and the like\): leave"),
        ({"model_config__is_attention_free": True}, "has layers with a state"),
        ({"model_config__is_mm_prefix_lm": True}, "lets the tokens of an image see each other"),
        ({"parallel_config__decode_context_parallel_size": 2}, "without decode context parallelism, got --decode-context.* 2"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "without prefill context parallelism, got .* 2: use"),
        ({"parallel_config__pipeline_parallel_size": 2}, "got --pipeline-parallel-size 2: use --tensor-parallel-size"),
        ({"speculative_config": object()}, "runs without speculative decoding, got a --speculative-config: leave it out"),
        ({"cache_config__cache_dtype": "fp8"}, "reads plain keys and values, got --kv-cache-dtype fp8: use auto"),
        ({"kv_transfer_config": object()}, "does not move its cache elsewhere, got a --kv-transfer-config"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "needs the hybrid KV cache manager, but it is disabled"),
    ],
)
def test_what_does_not_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(config(**changes))
