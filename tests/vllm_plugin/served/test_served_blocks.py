"""Streaming heads hold the blocks of their sink and their window, and give all others back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sparse_compile as sc
from sparse_compile.masks import causal, per_head, sink, sliding_window
from support.serving import BLOCK, NEW, prompts, serve

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

STREAMING = causal & (sink(4) | sliding_window(64))
LENGTH = 300


def held(group: dict[str, Any], computed: int, new: int) -> int:
    """The blocks that a request holds in a group while ``new`` tokens follow ``computed`` tokens."""
    blocks = -(-(computed + new) // BLOCK)
    if group["window"] is None:
        return blocks
    skipped, kept = max(0, computed - int(group["window"]) + 1) // BLOCK, -(-int(group["sink"]) // BLOCK)
    return blocks - max(0, skipped - kept)


@pytest.mark.parametrize("chunk", [512, 96], ids=["whole", "chunks"])
@pytest.mark.parametrize(
    ("policy", "specs"),
    [
        (sc.Policy(STREAMING), {"StreamingSpec": 2}),
        (sc.Policy(per_head([causal, STREAMING, STREAMING, causal])), {"FullAttentionSpec": 4, "StreamingSpec": 4}),
    ],
    ids=["streaming", "duo"],
)
def test_every_step_holds_the_computed_number_of_blocks(
    policy: sc.Policy, specs: dict[str, int], chunk: int, tmp_path: Path
) -> None:
    options = {"max_num_batched_tokens": chunk, "enable_prefix_caching": False}
    served = serve(policy, prompts([LENGTH]), tmp_path, options=options)
    assert {group["spec"]: len(group["layers"]) for group in served.groups} == specs
    starts = [*range(0, LENGTH, chunk), *range(LENGTH, LENGTH + NEW - 1)]
    stops = [*starts[1:], LENGTH + NEW - 1]
    expected = [
        sum(held(group, start, stop - start) for group in served.groups) for start, stop in zip(starts, stops, strict=True)
    ]
    assert served.blocks[: len(expected)] == expected
    full = -(-LENGTH // BLOCK) * len(served.groups)
    assert expected[-1] < full
