"""Reports on page selection: the report, ``explain``, bytes, and the attention mass of the selected keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparse_compile as sc
from bench.recall import recall
from sparse_compile.explain_config import explain_config
from sparse_compile.masks import Mask, causal, page_topk, sink, sliding_window
from sparse_compile.masks.density import largest_density
from support.models import left_padding
from support.oracles.cache import llama, random_tokens
from support.sessions.cache import Session

pytestmark = pytest.mark.usefixtures("fresh")


def test_the_report_counts_the_budget_and_says_that_a_prefill_is_lossy() -> None:
    policy = causal & (sink(4) | page_topk(128, page=8))
    report = sc.explain(llama(), random_tokens(512), policy=policy, use_cache=False)
    site = report.sites[0]
    # Every block sees the lower half of itself. Blocks after the first also see the sink's block, which uses up the budget.
    assert site.density == pytest.approx((4 * 128 * 129 / 2 + 3 * 128 * 128) / 512**2)
    assert "lossy" in site.reason
    assert site.policy_mask == "causal & (sink(4) | page_topk(128, page=8))"


@pytest.mark.parametrize(
    "mask",
    [page_topk(16), page_topk(128), page_topk(256), sliding_window(300) | page_topk(384), sink(200) | page_topk(256)],
    ids=str,
)
def test_the_density_is_what_is_visible(mask: Mask) -> None:
    """The density is exact if the budget is always used up by pages that are visible as a whole."""
    q, k = torch.randn(1, 1, 700, 8), torch.randn(1, 1, 700, 8)
    seen = (causal & mask).selected(q, k, page_size=128, q_block=128).dense(700, 700)
    assert largest_density(causal & mask, 700, 700, 0, 1, (128, 128)) == pytest.approx(float(seen.float().mean()))


def test_a_decode_step_is_not_called_lossy_beyond_its_policy() -> None:
    policy = sc.Policy(prefill=causal, decode=causal & page_topk(16, page=4))
    session = Session(policy, page_size=4)
    session.feed(random_tokens(40), [39, 1])
    site = session.model.sparse_compile_report.sites[-1]
    assert (site.phase, site.action, site.density) == ("decode", "sparse", 16 / 64)
    assert "lossy" not in site.reason


def test_explain_plans_a_cache_for_a_policy_that_chooses(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    policy = sc.policies.quest(64, page=16, dense_layers=1)
    report = explain_config(tmp_path, policy, 1, 200, "cuda")
    assert [site.policy_mask for site in report.sites if site.phase == "decode"] == ["", "causal & page_topk(64)"]
    assert not report.left


def test_digests_count_among_the_bytes() -> None:
    config = llama().config
    plain, chosen = (sc.SparseCache(config, mask, max_length=256, page_size=16) for mask in (causal, causal & page_topk(64)))
    summaries, scores, table = 256 // 16 * 2 * config.hidden_size // config.num_attention_heads, 256 // 16, 64 // 16
    kept = 4 * (summaries + scores + 1 + table)
    assert chosen.nbytes - plain.nbytes == config.num_hidden_layers * config.num_key_value_heads * kept + 8
    assert "page_topk(64)" in repr(chosen.cached_layers[0])


def test_padded_rows_need_no_whole_pages() -> None:
    """Masks cover every column of the last page, even if ``max_length`` ends within it."""
    results = []
    for length in (50, 56):
        torch._dynamo.reset()
        policy = causal & (sink(2) | sliding_window(5) | page_topk(24, page=4))
        model = sc.compile(llama(), policy, inner="eager")
        cache = sc.SparseCache(model.config, policy, max_length=length, max_batch=2, page_size=8)
        options = {"attention_mask": left_padding(length=30, pad=7), "max_new_tokens": 12, "min_new_tokens": 12}
        results.append(model.generate(random_tokens(30, batch=2), past_key_values=cache, do_sample=False, **options))
    assert torch.equal(*results)


def test_recall_is_whole_when_everything_is_read_and_less_when_not() -> None:
    model, ids = llama(), random_tokens(96)
    everything = recall(model, ids, page_topk(96, page=4), page_size=8, queries=8)
    assert [row.layer for row in everything] == [0, 1]
    assert all(row.chosen == pytest.approx(1) and row.recall == pytest.approx(1) for row in everything)
    some = recall(model, ids, page_topk(24, page=4), page_size=8, queries=8)
    assert all(24 / 96 < row.chosen < row.best < 1 for row in some)
    by_keys = recall(model, ids, page_topk(24, page=4, score="keys"), page_size=8, queries=8)
    assert sum(row.chosen for row in by_keys) > sum(row.chosen for row in some)
    assert model.config._attn_implementation == "sdpa"
