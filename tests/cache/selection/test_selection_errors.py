"""Errors of page selection state the rule, the value and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, page_topk, per_head, prefix, sink, sliding_window
from sparse_compile.passes.ops.cache.cache_update import SparseCacheError
from support.oracles.cache import random_tokens
from support.oracles.selection import build

pytestmark = pytest.mark.usefixtures("fresh")


def new_cache(policy: sc.Policy | Mask, **options: Any) -> sc.SparseCache:
    return sc.SparseCache(build(options.pop("name", "llama")).config, policy, **{"max_length": 64, "page_size": 4, **options})


@pytest.mark.parametrize(
    ("mask", "shown"),
    [
        (causal & (sink(8) | sliding_window(5) | page_topk(12, page=4)), 13),
        (causal & (sink(4) | page_topk(3, page=1)), 4),
        (causal & (sliding_window(100) | page_topk(16, page=4)), 64),
        (per_head([causal, causal & (sink(5) | page_topk(4, page=4))]), 5),
    ],
    ids=str,
)
def test_a_budget_below_the_static_part_is_refused(mask: Mask, shown: int) -> None:
    with pytest.raises(ValueError, match=rf"page_topk\(.*\).* {shown} keys: give"):
        new_cache(sc.Policy(prefill=causal, decode=mask))


def test_a_budget_of_just_the_static_part_is_a_cache() -> None:
    for mask in (causal & (sink(8) | sliding_window(4) | page_topk(12, page=4)), causal & (sink(4) | page_topk(4, page=1))):
        assert new_cache(sc.Policy(prefill=causal, decode=mask)).get_seq_length() == 0


@pytest.mark.parametrize(("page", "page_size"), [(3, 4), (8, 4), (16, 24), (5, 1)])
def test_pages_that_do_not_nest_are_refused(page: int, page_size: int) -> None:
    with pytest.raises(ValueError, match=rf"a decode step reads pages of {page_size} keys, but .* summarizes pages of {page}"):
        new_cache(sc.Policy(prefill=causal, decode=causal & page_topk(64, page=page)), page_size=page_size)


def test_a_prefill_reads_blocks_of_its_own_size() -> None:
    with pytest.raises(ValueError, match=r"a prefill reads blocks of 128 keys, but .* summarizes pages of 48: .* divides 128$"):
        new_cache(causal & page_topk(96, page=48), page_size=48)


def test_the_usual_sizes_nest() -> None:
    assert new_cache(causal & page_topk(64), page_size=64).get_seq_length() == 0


@pytest.mark.parametrize(
    "layers",
    [
        {0: causal, 1: causal & page_topk(8, page=4, share={1: 0})},
        {0: per_head([causal, causal & page_topk(8, page=4)]), 1: causal & page_topk(8, page=4, share=0)},
        {0: causal & (sink(2) | sliding_window(2)), 1: causal & page_topk(8, page=4, share=0)},
    ],
    ids=["dense", "one head of two", "streaming"],
)
def test_a_leader_that_selects_nothing_is_refused(layers: dict[Any, Mask]) -> None:
    with pytest.raises(ValueError, match="layer 0"):
        new_cache(sc.Policy(prefill=causal, decode=sc.Policy(layers=layers)))


def test_a_leader_that_runs_later_or_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="which runs later: name an earlier layer"):
        new_cache(causal & page_topk(8, page=4, share=1))


def test_a_leader_map_for_a_larger_model_is_refused() -> None:
    mask = causal & page_topk(8, page=4, share={1: 0, 7: 5})
    with pytest.raises(ValueError, match=r"shares layers that the model does not have: it has 2 \(0 to 1\)"):
        new_cache(sc.Policy(prefill=causal, decode=mask))


def test_what_the_static_part_shows_is_counted_not_guessed() -> None:
    with pytest.raises(ValueError, match="alone shows 6 keys: give page_topk at least 6 tokens"):
        new_cache(sc.Policy(prefill=causal, decode=causal & (prefix(6) | page_topk(4, page=4))))
    assert new_cache(sc.Policy(prefill=causal, decode=causal & (prefix(6) | page_topk(32, page=4)))).get_seq_length() == 0


def test_a_prefill_budget_below_the_static_part_is_refused_without_a_cache_too() -> None:
    with pytest.raises(Exception, match="alone shows 200 keys"):
        sc.explain(
            build("llama"), torch.ones(1, 300, dtype=torch.int64), policy=causal & (sliding_window(200) | page_topk(128))
        )


def test_a_model_of_another_policy_cannot_use_choices_again() -> None:
    """Until the next scoring, pages that were selected under one mask would be read under another."""
    chosen = causal & page_topk(16, page=4, every=4)
    cache = new_cache(sc.Policy(prefill=causal, decode=chosen))
    for other, error in (
        (sc.Policy(prefill=causal, decode=chosen & sliding_window(24)), "reuses its page selection"),
        (sc.Policy(prefill=causal, decode=causal & page_topk(8, page=4)), "was not built for"),
    ):
        torch._dynamo.reset()
        cache.reset()
        model = sc.compile(build("llama"), other, inner="eager")
        model(torch.ones(1, 20, dtype=torch.int64), past_key_values=cache)
        with pytest.raises(SparseCacheError, match=error):
            model(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)


def test_two_selectors_of_a_kv_head_are_refused() -> None:
    by_query_head = [causal & page_topk(size, page=4) for size in (8, 12, 8, 8)]
    with pytest.raises(ValueError, match="need the same page_topk, got page_topk"):
        new_cache(sc.Policy(prefill=causal, decode=per_head(by_query_head)))


def test_the_opposite_of_a_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be negated: remove the ~"):
        new_cache(sc.Policy(prefill=causal, decode=causal & ~(sink(2) & page_topk(8, page=4))))


def test_a_policy_within_its_rules_is_shown_by_name() -> None:
    policy = sc.Policy(prefill=causal, decode=causal & page_topk(8, page=4, every=2))
    assert "page_topk(8, page=4, every=2)" in repr(policy)
    assert sc.Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_decode_step_without_a_sparse_cache_is_refused(kind: str) -> None:
    ids, policy = random_tokens(12), sc.Policy(prefill=causal, decode=causal & page_topk(8, page=4))
    model = sc.compile(build("llama"), policy, inner="eager")
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids[:, :11], past_key_values=cache)
        with pytest.raises(Exception, match="SparseCache") as refused:
            model(ids[:, 11:], past_key_values=cache)
    assert isinstance(refused.value, sc.SparseCacheError | ValueError)


def test_generate_without_a_sparse_cache_is_refused() -> None:
    policy = sc.Policy(prefill=causal, decode=causal & page_topk(8, page=4))
    model = sc.compile(build("llama"), policy, inner="eager")
    with pytest.raises(Exception, match="SparseCache") as refused:
        model.generate(random_tokens(12), max_new_tokens=4, cache_implementation="dynamic")
    assert isinstance(refused.value, sc.SparseCacheError | ValueError)


def test_a_cache_of_another_policy_is_refused_or_selects_as_its_own_says() -> None:
    """The masks of model and cache both apply, so a model compiled with a selector needs a cache built with it."""
    policy = sc.Policy(prefill=causal, decode=causal & page_topk(8, page=4))
    model = sc.compile(build("llama"), policy, inner="eager")
    with torch.no_grad():
        cache = new_cache(causal)
        model(random_tokens(12), past_key_values=cache)
        with pytest.raises(Exception, match="page_topk") as refused:
            model(random_tokens(1), past_key_values=cache)
    assert isinstance(refused.value, sc.SparseCacheError | ValueError)


def test_a_file_of_a_cache_that_selects_otherwise_is_refused(tmp_path: Any) -> None:
    def cache(selector: Mask) -> sc.SparseCache:
        return new_cache(sc.Policy(prefill=causal, decode=causal & selector))

    cache(page_topk(8, page=4)).save(tmp_path / "prompt")
    for other in (page_topk(12, page=4), page_topk(8, page=2), page_topk(8, page=4, score="mean"), sliding_window(64)):
        with pytest.raises(ValueError, match="another model, policy"):
            cache(other).load(tmp_path / "prompt")
