"""vLLM generates the tokens that transformers generates with a SparseCache, under every kind of policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sparse_compile as sc
from sparse_compile.masks import causal, dilated, per_head, sink, sliding_window
from support.serving import BLOCK, assert_equal, prompts, reference, serve

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

STREAMING = causal & (sink(4) | sliding_window(64))
DUO = sc.Policy(per_head([causal, STREAMING, STREAMING, causal]))
POLICIES = {
    "streaming": sc.Policy(STREAMING),
    "layers": sc.Policy(STREAMING, layers={0: causal}),
    "duo": DUO,
    "unequal layers": sc.Policy(
        per_head([STREAMING, causal, STREAMING, STREAMING]), layers={1: per_head([causal, causal, STREAMING, causal])}
    ),
    "two windows": sc.Policy(per_head([STREAMING, causal & (sink(40) | sliding_window(32))] * 2)),
    "four windows": sc.Policy(
        per_head([STREAMING, causal & (sink(40) | sliding_window(32))] * 2),
        layers={1: per_head([causal & (sink(2) | sliding_window(50)), causal & (sink(70) | sliding_window(40))] * 2)},
    ),
    "query heads": sc.Policy(per_head([causal, STREAMING] * 4)),
    "window": sc.Policy(causal & sliding_window(48)),
    "dilated": sc.Policy(causal & dilated(20, 2)),
}


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_equal_in_a_ragged_batch_and_on_prefix_hits(name: str, tmp_path: Path) -> None:
    texts = prompts()
    served = serve(POLICIES[name], texts, tmp_path, rounds=2, options={"enable_prefix_caching": True})
    expected = reference(POLICIES[name], texts)
    first, second = served.rounds
    assert_equal(first, expected)
    assert_equal(second, expected)
    assert [text.cached for text in first] == [0, 0, 0]
    assert [text.cached for text in second] == [(len(ids) - 1) // BLOCK * BLOCK for ids in texts]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("duo", {"max_num_batched_tokens": 96}),
        ("duo", {"max_num_batched_tokens": 41}),  # chunks end inside of blocks
        ("streaming", {"tensor_parallel_size": 2}),
        ("duo", {"tensor_parallel_size": 2}),
        ("duo", {"enforce_eager": False}),
    ],
    ids=["chunks", "odd chunks", "streaming on two ranks", "duo on two ranks", "compiled"],
)
def test_tokens_are_equal_in_other_ways_of_serving(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    texts = prompts()
    served = serve(POLICIES[name], texts, tmp_path, options=options)
    assert_equal(served.rounds[0], reference(POLICIES[name], texts))


@pytest.mark.parametrize("caching", [True, False])
def test_tokens_are_equal_where_requests_wait_for_blocks(caching: bool, tmp_path: Path) -> None:
    """The pool has room for two texts and one block of it is never used, so cached blocks are taken while few are free."""
    texts, pool = prompts([300, 310, 290, 150]), 38
    options = {"num_gpu_blocks_override": pool, "max_num_batched_tokens": 96, "enable_prefix_caching": caching}
    served = serve(DUO, texts, tmp_path, rounds=2, options=options)
    expected = reference(DUO, texts)
    assert max(served.blocks) + 300 // BLOCK > pool - 1  # a third text has to wait
    for found in served.rounds:
        assert_equal(found, expected)


def test_balance_shares_the_heads_of_a_kind_between_ranks(tmp_path: Path) -> None:
    uneven = sc.Policy(per_head([causal, causal, STREAMING, STREAMING]), layers={1: per_head([STREAMING, causal] * 2)})
    options, settings = {"tensor_parallel_size": 2}, {"balance": True}
    served = serve(uneven, prompts(), tmp_path, options=options, settings=settings)
    assert_equal(served.rounds[0], reference(uneven, prompts()))


def test_without_a_policy_nothing_changes(tmp_path: Path) -> None:
    served = serve(None, prompts(), tmp_path)
    assert [(group["spec"], len(group["layers"])) for group in served.groups] == [("FullAttentionSpec", 2)]
    assert_equal(served.rounds[0], reference(None, prompts()))
