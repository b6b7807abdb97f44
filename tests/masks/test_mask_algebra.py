"""Properties of every mask: random trees compared with operations on dense tensors."""

from __future__ import annotations

import pickle

import torch
from hypothesis import example, given
from hypothesis import strategies as st

import sparse_compile.masks
from sparse_compile.masks import Mask, causal, full, sink, sliding_window
from support.masks.random_masks import BATCH, HEADS, Shape, masks, patterns, shapes, trees
from support.oracles.masks import as_a_kernel_sees

NAMES = {name: getattr(sparse_compile.masks, name) for name in sparse_compile.masks.__all__}
block_sizes = st.one_of(st.integers(1, 6), st.tuples(st.integers(1, 6), st.integers(1, 6)), st.just(128))
# Use only a few patterns, so that parts of a tree are often equal, imply one another or contradict one another.
alike = trees(
    3, st.sampled_from([sparse_compile.masks.sink(n) for n in (1, 3)] + [sparse_compile.masks.chunked(n) for n in (2, 4)])
)


# -- the operators keep their meaning -------------------------------------------------------------------------------


@given(masks, masks, shapes)
def test_and_shows_what_both_show(a: Mask, b: Mask, shape: Shape) -> None:
    assert torch.equal(shape.dense(a & b), shape.dense(a) & shape.dense(b))


@given(masks, masks, shapes)
def test_or_shows_what_either_shows(a: Mask, b: Mask, shape: Shape) -> None:
    assert torch.equal(shape.dense(a | b), shape.dense(a) | shape.dense(b))


@given(masks, shapes)
def test_not_shows_what_is_hidden(a: Mask, shape: Shape) -> None:
    assert torch.equal(shape.dense(~a), ~shape.dense(a))


@given(alike, alike, shapes)
def test_simplifying_an_and_keeps_its_meaning(a: Mask, b: Mask, shape: Shape) -> None:
    assert torch.equal(shape.dense(a & b), shape.dense(a) & shape.dense(b))


@given(alike, alike, shapes)
def test_simplifying_an_or_keeps_its_meaning(a: Mask, b: Mask, shape: Shape) -> None:
    assert torch.equal(shape.dense(a | b), shape.dense(a) | shape.dense(b))


@given(masks, masks, shapes)
def test_de_morgan_holds_of_and(a: Mask, b: Mask, shape: Shape) -> None:
    assert torch.equal(shape.dense(~(a & b)), shape.dense(~a | ~b))


@given(masks, masks, shapes)
def test_de_morgan_holds_of_or(a: Mask, b: Mask, shape: Shape) -> None:
    assert torch.equal(shape.dense(~(a | b)), shape.dense(~a & ~b))


@given(masks, masks, masks, shapes)
def test_and_distributes_over_or(a: Mask, b: Mask, c: Mask, shape: Shape) -> None:
    assert torch.equal(shape.dense(a & (b | c)), shape.dense(a & b | a & c))


# -- equal as values ------------------------------------------------------------------------------------------------


@given(masks)
def test_double_negation_is_nothing(a: Mask) -> None:
    assert ~~a == a


@given(masks)
def test_a_mask_with_itself_is_itself(a: Mask) -> None:
    assert (a & a, a | a) == (a, a)


@given(masks, masks)
def test_and_absorbs_or(a: Mask, b: Mask) -> None:
    assert a & (a | b) == a


@given(masks, masks)
def test_or_absorbs_and(a: Mask, b: Mask) -> None:
    assert a | (a & b) == a


@given(masks)
def test_full_is_neutral_in_and_and_absorbing_in_or(a: Mask) -> None:
    assert (a & full, a | full) == (a, full)


@given(masks)
def test_nothing_is_neutral_in_or_and_absorbing_in_and(a: Mask) -> None:
    assert (a | ~full, a & ~full) == (a, ~full)


@given(trees(4, patterns))
def test_a_mask_and_its_negation_show_nothing(a: Mask) -> None:
    assert a & ~a == ~full


@given(trees(4, patterns))
def test_a_mask_or_its_negation_shows_everything(a: Mask) -> None:
    assert a | ~a == full


@given(masks, masks)
@example(causal | sink(1), (causal | sink(1)) & (causal | sliding_window(1)))  # each implies the other
def test_the_order_of_operands_does_not_matter(a: Mask, b: Mask) -> None:
    assert (a & b, a | b) == (b & a, b | a)


@given(masks, masks)
def test_masks_that_differ_only_in_order_hash_the_same(a: Mask, b: Mask) -> None:
    assert hash(a & b) == hash(b & a)


@given(masks)
def test_repr_is_what_you_would_type(a: Mask) -> None:
    written = repr(a)
    if "<" not in written:  # long tensors are shortened
        assert eval(written, dict(NAMES)) == a


@given(masks)
def test_json_keeps_masks(a: Mask) -> None:
    assert Mask.from_json(a.to_json()) == a


@given(masks)
def test_pickle_keeps_masks(a: Mask) -> None:
    assert pickle.loads(pickle.dumps(a)) == a


@given(masks)
def test_rebuilding_from_children_keeps_masks(a: Mask) -> None:
    assert a.rebuild(a.children()) == a


# -- what is derived agrees with dense ------------------------------------------------------------------------------


@given(masks, shapes, block_sizes)
def test_a_kernel_sees_the_dense_mask(a: Mask, shape: Shape, block_size: int | tuple[int, int]) -> None:
    table = a.block_mask(shape.q_len, shape.kv_len, q_offset=shape.q_offset, batch=BATCH, heads=HEADS, block_size=block_size)
    assert torch.equal(as_a_kernel_sees(table), shape.dense(a))


@given(trees(4, patterns), shapes, block_sizes)
def test_a_kernel_sees_the_dense_mask_of_one_head(a: Mask, shape: Shape, block_size: int | tuple[int, int]) -> None:
    table = a.block_mask(shape.q_len, shape.kv_len, q_offset=shape.q_offset, batch=BATCH, block_size=block_size)
    assert torch.equal(as_a_kernel_sees(table), shape.dense(a)[:, :1])


@given(masks, shapes)
def test_density_is_the_mean_of_dense(a: Mask, shape: Shape) -> None:
    density = a.density(shape.q_len, shape.kv_len, q_offset=shape.q_offset, batch=BATCH, heads=HEADS)
    assert density == shape.dense(a).double().mean().item()


@given(masks, masks, shapes)
def test_what_implies_another_shows_no_more(a: Mask, b: Mask, shape: Shape) -> None:
    if a.implies(b):
        assert not (shape.dense(a) & ~shape.dense(b)).any()


@given(alike, alike, shapes)
def test_what_implies_a_similar_mask_shows_no_more(a: Mask, b: Mask, shape: Shape) -> None:
    if a.implies(b):
        assert not (shape.dense(a) & ~shape.dense(b)).any()


@given(masks, masks)
def test_a_conjunction_implies_its_parts(a: Mask, b: Mask) -> None:
    assert (a & b).implies(a)


@given(masks, masks)
def test_a_part_implies_a_disjunction(a: Mask, b: Mask) -> None:
    assert a.implies(a | b)


@given(masks, shapes, st.integers(0, HEADS - 1))
def test_for_head_sees_what_the_head_sees(a: Mask, shape: Shape, head: int) -> None:
    one = a.for_head(head, HEADS).dense(shape.q_len, shape.kv_len, q_offset=shape.q_offset, batch=BATCH)
    assert torch.equal(one[:, 0], shape.dense(a)[:, head])


@given(masks, shapes)
def test_head_groups_see_what_their_heads_see(a: Mask, shape: Shape) -> None:
    together = torch.zeros(BATCH, HEADS, shape.q_len, shape.kv_len, dtype=torch.bool)
    for mask, heads in a.head_groups(HEADS).items():
        together[:, list(heads)] = mask.dense(shape.q_len, shape.kv_len, q_offset=shape.q_offset, batch=BATCH)
    assert torch.equal(together, shape.dense(a))


@given(masks)
def test_head_groups_hold_every_head_once(a: Mask) -> None:
    assert sorted(head for heads in a.head_groups(HEADS).values() for head in heads) == list(range(HEADS))


@given(masks, shapes)
def test_spreading_over_heads_keeps_the_meaning(a: Mask, shape: Shape) -> None:
    assert torch.equal(shape.dense(a.for_heads(HEADS)), shape.dense(a))


@given(masks, shapes, st.integers(1, 5))
def test_rows_do_not_depend_on_the_chunk_they_are_asked_in(a: Mask, shape: Shape, size: int) -> None:
    chunks = [
        Shape(min(size, shape.q_len - first), shape.kv_len, shape.q_offset + first) for first in range(0, shape.q_len, size)
    ]
    assert torch.equal(torch.cat([chunk.dense(a) for chunk in chunks], dim=2), shape.dense(a))
