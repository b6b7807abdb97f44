"""Decode steps under page_topk read the pages that a SparseCache selects, and their summaries are cached with the prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sparse_compile as sc
from sparse_compile.masks import causal, page_topk, per_head, sink, sliding_window
from support.serving import BLOCK, NEW, assert_equal, prompts, reference, serve

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

STREAMING = causal & (sink(4) | sliding_window(64))
CHOSEN = causal & (sink(4) | sliding_window(32) | page_topk(128))
TOPK = sc.Policy(prefill=causal, decode=CHOSEN)
QUEST = sc.policies.quest(96, dense_layers=1)
SOME_HEADS = sc.Policy(prefill=causal, decode=per_head([causal, causal & page_topk(128, group="mean")] * 2))
LSERVE = sc.Policy(prefill=per_head([causal, STREAMING] * 2), decode=per_head([causal & page_topk(96), STREAMING] * 2))


@pytest.mark.parametrize("policy", [TOPK, QUEST, SOME_HEADS], ids=["top-k", "quest", "some heads"])
def test_tokens_are_equal_in_a_ragged_batch_and_on_prefix_hits(policy: sc.Policy, tmp_path: Path) -> None:
    texts = prompts()
    served = serve(policy, texts, tmp_path, rounds=2, options={"enable_prefix_caching": True})
    expected = reference(policy, texts)
    assert [len(served.groups), {group["spec"] for group in served.groups}] == [1, {"FullAttentionSpec"}]
    for found in served.rounds:
        assert_equal(found, expected)
    assert [text.cached for text in served.rounds[1]] == [(len(ids) - 1) // BLOCK * BLOCK for ids in texts]


def test_beside_streaming_heads_a_prefix_is_cached_in_blocks_of_summaries(tmp_path: Path) -> None:
    """vLLM makes all blocks equally large, so that one of summaries describes 16 blocks of keys."""
    texts = prompts([600, 150])
    served = serve(LSERVE, texts, tmp_path, rounds=2, options={"enable_prefix_caching": True})
    expected = reference(LSERVE, texts)
    assert sorted(group["spec"] for group in served.groups) == ["FullAttentionSpec", "FullAttentionSpec", "StreamingSpec"]
    for found in served.rounds:
        assert_equal(found, expected)
    assert [text.cached for text in served.rounds[1]] == [16 * BLOCK, 0]


@pytest.mark.parametrize(
    "options",
    [{"max_num_batched_tokens": 96}, {"max_num_batched_tokens": 41}, {"tensor_parallel_size": 2}, {"enforce_eager": False}],
    ids=["chunks", "odd chunks", "two ranks", "compiled"],
)
def test_tokens_are_equal_in_other_ways_of_serving(options: dict[str, Any], tmp_path: Path) -> None:
    texts = prompts()
    assert_equal(serve(TOPK, texts, tmp_path, options=options).rounds[0], reference(TOPK, texts))


def test_a_preempted_request_goes_on(tmp_path: Path) -> None:
    """Five texts fill the pool, and each needs one more block after ten tokens. vLLM then repeats a text as a prompt.

    A prompt reads all pages, so tokens are compared up to there. Texts that were not preempted are equal to the end.
    """
    texts = prompts([150, 151, 149, 148, 147])
    served = serve(TOPK, texts, tmp_path, options={"num_gpu_blocks_override": 26, "max_num_seqs": 8})
    pairs = list(zip(served.rounds[0], reference(TOPK, texts), strict=True))
    assert max(served.blocks) == 25
    assert all(found.tokens[:9] == expected.tokens[:9] and len(found.tokens) == NEW for found, expected in pairs)
    assert sum(found.tokens == expected.tokens for found, expected in pairs) >= 3


def test_decode_steps_read_the_budget(tmp_path: Path) -> None:
    served = serve(TOPK, prompts([300]), tmp_path)
    pages = -(-300 // BLOCK)
    assert served.read["read"] / served.read["held"] == pytest.approx(128 / BLOCK / pages, rel=0.1)
