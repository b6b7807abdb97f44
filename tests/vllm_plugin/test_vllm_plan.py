"""The plan of parts: equal sizes, equal names on all ranks, few groups, and errors for what vLLM cannot serve."""

from __future__ import annotations

from collections import Counter

import pytest

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, dilated, padding, page_topk, per_head, sink, sliding_window
from sparse_compile.vllm.plan import Part, Plan, Shape, count_groups, plan_model

STREAMING = causal & (sink(4) | sliding_window(64))
SHAPE = Shape(heads=8, kv_heads=4, windows=(None, None))


def plan(policy: sc.Policy | Mask, shape: Shape = SHAPE, *, ranks: int = 1, one_head: bool = False) -> Plan:
    return plan_model(sc.Policy(policy), shape, max_length=512, block_size=32, ranks=ranks, one_head=one_head)


def choosing(mask: Mask) -> sc.Policy:
    return sc.Policy(prefill=causal, decode=causal & mask)


def kinds(parts: tuple[Part, ...]) -> list[tuple[str, tuple[int, ...]]]:
    return sorted((part.kind.name, part.kv_heads) for part in parts)


def test_heads_of_a_kind_are_one_part() -> None:
    duo = plan(per_head([causal, STREAMING, STREAMING, causal]))
    assert kinds(duo.parts(0, 0)) == [("full", (0, 3)), ("sink4_recent64", (1, 2))]
    assert duo.groups() == 2


def test_a_uniform_policy_splits_nothing() -> None:
    assert kinds(plan(STREAMING, one_head=True).parts(1, 0)) == [("sink4_recent64", (0, 1, 2, 3))]


def test_parts_of_all_layers_have_equally_many_heads() -> None:
    first, second = per_head([causal, STREAMING, STREAMING, STREAMING]), per_head([causal, causal, causal, STREAMING])
    uneven = plan(sc.Policy(first, layers={1: second}))
    assert {len(part.kv_heads) for layer in range(2) for part in uneven.parts(layer, 0)} == {1}
    assert uneven.groups() == 2  # four parts of each kind


def test_a_platform_may_need_parts_of_one_head() -> None:
    duo = plan(per_head([causal, STREAMING, STREAMING, causal]), one_head=True)
    assert [heads for _, heads in kinds(duo.parts(0, 0))] == [(0,), (3,), (1,), (2,)]


def test_windows_need_no_mask_of_ours() -> None:
    (part,) = plan(causal & sliding_window(64)).parts(0, 0)
    assert part.kind.stock and part.kind.window == 64
    (part,) = plan(causal, Shape(8, 4, (128, None))).parts(0, 0)
    assert part.kind.stock and part.kind.window == 128  # the model's own window


def test_the_window_of_the_model_stays() -> None:
    (part,) = plan(STREAMING, Shape(8, 4, (32, 32))).parts(0, 0)
    assert part.kind.past == (0, 32)  # a sink beyond the model's own window stays hidden


def test_what_leaves_gaps_is_masked() -> None:
    (part,) = plan(causal & dilated(20, 2)).parts(0, 0)
    assert not part.kind.stock and part.kind.past == (0, 39)


def test_query_heads_of_a_kv_head_may_differ() -> None:
    (part,) = plan(per_head([causal, STREAMING] * 4)).parts(0, 0)
    assert part.kind.name == "masked" and part.kind.masks == (causal, STREAMING)


def test_heads_that_select_pages_store_every_key() -> None:
    quest = plan(sc.policies.quest(64, dense_layers=1))
    assert kinds(quest.parts(0, 0)) == [("full", (0, 1, 2, 3))]
    assert kinds(quest.parts(1, 0)) == [("top64", (0, 1, 2, 3))]
    assert quest.groups() == 1


def test_page_summaries_beside_streaming_heads_are_groups_of_their_own() -> None:
    mixed = plan(sc.Policy(prefill=per_head([causal, STREAMING] * 2), decode=per_head([causal & page_topk(64), STREAMING] * 2)))
    assert mixed.groups() == 3


def test_names_are_equal_on_all_ranks_and_hold_no_number_between_dots() -> None:
    split = plan(per_head([causal, STREAMING, STREAMING, causal]), ranks=2)
    first, second = (split.parts(0, rank) for rank in range(2))
    assert [part.name for part in first] == [part.name for part in second]
    assert kinds(first) == [("full", (0,)), ("sink4_recent64", (1,))]
    assert kinds(second) == [("full", (1,)), ("sink4_recent64", (0,))]
    assert not any("." in part.name or part.name.isdigit() for part in first)


def test_ranks_beyond_the_heads_share_them() -> None:
    shared = plan(STREAMING, Shape(8, 2, (None,)), ranks=4)
    assert [kinds(shared.parts(0, rank)) for rank in range(4)] == [[("sink4_recent64", (0,))]] * 4


def test_uneven_ranks_are_refused_with_numbers_and_remedy() -> None:
    message = r'layer 0 has rank 0: 1 full, 1 sink4_recent64; rank 1: 2 sink4_recent64: set "balance": true beside the policy'
    with pytest.raises(ValueError, match=message):
        plan(per_head([causal, STREAMING, STREAMING, STREAMING]), ranks=2)


def test_too_many_groups_are_refused_with_the_number() -> None:
    shape = Shape(8, 4, (None,) * 32)
    with pytest.raises(ValueError, match=r"makes 32 KV cache groups of vLLM, and at most 16 are served"):
        plan(sc.Policy(STREAMING, layers={0: causal}), shape)


def test_too_many_masks_are_refused_with_the_number() -> None:
    layers: dict[int | range | str, Mask] = {n: causal & (sink(4) | sliding_window(64 + n)) for n in range(5)}
    with pytest.raises(
        ValueError, match=r"has 5 different masks that are no plain windows, and vLLM serves at most 4: use fewer"
    ):
        plan(sc.Policy(layers=layers), Shape(8, 4, (None,) * 5))


@pytest.mark.parametrize("counts", [[5], [3, 3], [2, 30], [12, 13], [4, 6], [4, 5, 9]])
def test_groups_hold_all_layers(counts: list[int]) -> None:
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    dealt = Counter(kind for kind, count in enumerate(counts) for _ in range(0, count, size))
    assert count_groups(counts) == dealt.total()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (sc.Policy(causal, layers={2: STREAMING}), "names layer 2, but the model has 2 layers"),
        (sc.Policy(per_head([causal, causal, STREAMING])), "a per_head of 3 masks, but the model has 8 query heads"),
        (sc.Policy(causal, layers={"*.self_attn": STREAMING}), "names modules: use layer indices or ranges"),
        (sc.Policy(prefill=causal, decode=STREAMING), "a batch of vLLM mixes prompts and decode steps"),
        (sc.Policy(causal & padding([[True] * 512])), "cannot read tensors, but layer 0 has .*: use patterns of positions"),
        (sc.Policy(causal & page_topk(64)), "prompts inside vLLM read all pages, but layer 0 has causal & page_topk"),
        (sc.policies.lserve(), r"page_topk\(4096, every=4\) in layer 0 inside vLLM keeps minima and maxima"),
        (sc.policies.block_topk(), "in layer 1 inside vLLM keeps minima and maxima and scores in every step and layer"),
        (choosing(page_topk(64, page=64)), "reads blocks of 32 keys: give it a page that divides them, or set --block-size"),
        (choosing(sliding_window(99) & page_topk(128)), "keeps every key and reads all of them in a prefill, but"),
        (choosing(sink(80) | page_topk(64)), "the static part .* alone shows 80 keys: give page_topk at least 80 tokens"),
    ],
)
def test_what_vllm_cannot_serve_is_an_error(policy: sc.Policy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(policy)
