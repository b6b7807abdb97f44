"""Score mods: what each one changes, the order in which they apply, and how they behave as values."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import sparse_compile.masks
from sparse_compile.masks import Captured, ScoreMod, alibi, bias, causal, clamped, log_weight, scaled, sink_logits, softcap

NAMES = {name: getattr(sparse_compile.masks, name) for name in sparse_compile.masks.__all__}
SLOPES = [0.5, 0.25]
WEIGHT = [[1.0, 2.0, 3.0, 0.0], [4.0, 1.0, 1.0, 1.0]]
TABLE = torch.arange(2 * 2 * 3 * 4, dtype=torch.float32).view(2, 2, 3, 4)

EXAMPLES = [
    alibi(SLOPES),
    softcap(30.0),
    log_weight(WEIGHT),
    bias(TABLE),
    bias(TABLE[:1, :, :1], q_start=3, kv_start=2),
    bias(TABLE, q_start=[3], kv_start=torch.tensor([2])),
    scaled(-0.5),
    scaled([[[[2.0]], [[0.5]]]]),
    scaled(TABLE, q_start=[3], kv_start=2),
    clamped(-50.0, 50.0),
    clamped(-math.inf, 50.0) >> scaled(2.0),
    sink_logits([1.0, -1.0]),
    softcap(30.0) >> alibi(SLOPES),
    alibi(SLOPES) >> log_weight(WEIGHT) >> sink_logits([1.0, -1.0]),
    alibi(torch.tensor(SLOPES, dtype=torch.bfloat16)),
    bias([[[[0.0, -math.inf], [math.inf, 1.0]]]]),
]
every_example = pytest.mark.parametrize("mod", EXAMPLES, ids=str)


def scores(mod: ScoreMod, q_len: int = 3, kv_len: int = 4, *, start: float = 0.0) -> Tensor:
    """Apply ``mod`` to scores that are all ``start``: ``[2, 2, q_len, kv_len]``."""
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (2, 2, q_len, kv_len)), indexing="ij")
    changed: Tensor = mod(torch.full(b.shape, start), b, h, i, j)
    return changed


def by_pair(change: Any) -> Tensor:
    """Call ``change(b, h, i, j)`` for every pair: ``[2, 2, 3, 4]``."""
    return torch.tensor([[[[change(b, h, i, j) for j in range(4)] for i in range(3)] for h in range(2)] for b in range(2)])


# -- what they do ---------------------------------------------------------------------------------------------------


def test_alibi_takes_more_the_further_a_key_is_back() -> None:
    torch.testing.assert_close(scores(alibi(SLOPES)), by_pair(lambda b, h, i, j: SLOPES[h] * (j - i)))


def test_softcap_keeps_scores_within_the_cap() -> None:
    torch.testing.assert_close(scores(softcap(2.0), start=3.0), torch.full((2, 2, 3, 4), 2 * math.tanh(1.5)))


def test_log_weight_counts_a_key_several_times() -> None:
    torch.testing.assert_close(scores(log_weight(WEIGHT)).exp(), by_pair(lambda b, h, i, j: WEIGHT[b][j]))


def test_log_weight_of_zero_hides_a_key() -> None:
    assert scores(log_weight(WEIGHT))[0, 0, 0, 3] == -math.inf


def test_one_row_of_weights_serves_every_batch() -> None:
    torch.testing.assert_close(scores(log_weight(WEIGHT[1:])).exp(), by_pair(lambda b, h, i, j: WEIGHT[1][j]))


def test_bias_is_added() -> None:
    torch.testing.assert_close(scores(bias(TABLE), start=1.0), TABLE + 1)


def test_scaled_multiplies() -> None:
    torch.testing.assert_close(scores(scaled(-2.0), start=3.0), torch.full((2, 2, 3, 4), -6.0))
    torch.testing.assert_close(scores(scaled(TABLE), start=3.0), TABLE * 3)
    by_head = scores(scaled([[[[2.0]], [[0.5]]]]), start=3.0)
    torch.testing.assert_close(by_head, by_pair(lambda b, h, i, j: [6.0, 1.5][h]))


def test_clamped_cuts_off() -> None:
    torch.testing.assert_close(scores(bias(TABLE) >> clamped(3.0, 9.0)), TABLE.clamp(3, 9))


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_clamped_ends_are_in_order(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"clamped needs a low end below the high end, got {low} and {high}: swap the two"):
        clamped(low, high)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_factor_is_finite(factor: float) -> None:
    with pytest.raises(ValueError, match=f"scaled needs a finite factor, got {factor}: hide keys with a mask"):
        scaled(factor)


def test_a_table_of_factors_has_four_axes() -> None:
    with pytest.raises(ValueError, match=r"scaled needs factor of shape \[batch, heads, queries, keys\], got \[2\]"):
        scaled([1.0, 2.0])


@pytest.mark.parametrize("axis", range(4))
def test_an_axis_of_size_one_serves_all_of_it(axis: int) -> None:
    one = TABLE.narrow(axis, 0, 1)
    torch.testing.assert_close(scores(bias(one)), one.expand(2, 2, 3, 4))


@pytest.mark.parametrize("starts", [(3, 2), ([3], torch.tensor([2]))], ids=["integers", "tensors"])
def test_bias_starts_at_its_positions(starts: tuple[Any, Any]) -> None:
    mod = bias(TABLE, *starts)
    b, h, i, j = torch.meshgrid(torch.arange(2), torch.arange(2), torch.arange(3, 6), torch.arange(2, 6), indexing="ij")
    torch.testing.assert_close(mod(torch.zeros(2, 2, 3, 4), b, h, i, j), TABLE)


def test_mods_apply_from_left_to_right() -> None:
    expected = by_pair(lambda b, h, i, j: 2 * math.tanh(1.5) + SLOPES[h] * (j - i))
    torch.testing.assert_close(scores(softcap(2.0) >> alibi(SLOPES), start=3.0), expected)


def test_the_other_order_caps_the_penalty_too() -> None:
    expected = by_pair(lambda b, h, i, j: 2 * math.tanh((3 + SLOPES[h] * (j - i)) / 2))
    torch.testing.assert_close(scores(alibi(SLOPES) >> softcap(2.0), start=3.0), expected)


def test_composition_is_associative() -> None:
    a, b, c = alibi(SLOPES), softcap(2.0), log_weight(WEIGHT)
    assert (a >> b) >> c == a >> (b >> c)


def test_scalars_under_vmap_give_the_same() -> None:
    mod: Any = softcap(2.0) >> alibi(SLOPES) >> log_weight(WEIGHT) >> bias(TABLE)
    under_vmap = mod
    for dims in ((0, None, None, None, 0), (0, None, None, 0, None), (0, None, 0, None, None), (0, 0, None, None, None)):
        under_vmap = torch.vmap(under_vmap, in_dims=dims)
    indices = (torch.arange(n) for n in (2, 2, 3, 4))
    torch.testing.assert_close(under_vmap(torch.ones(2, 2, 3, 4), *indices), scores(mod, start=1.0))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_takes_them() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 8, generator=random) for n in (3, 4, 4))
    mod = softcap(2.0) >> alibi(SLOPES) >> bias(TABLE / 10)
    result = flex_attention(q, k, v, score_mod=mod, block_mask=causal.block_mask(3, 4, q_offset=1, block_size=2))
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (2, 2, 3, 4)), indexing="ij")
    weights = mod(q @ k.mT / math.sqrt(8), b, h, i, j).where(causal.dense(3, 4, q_offset=1), -math.inf).softmax(-1)
    assert isinstance(result, Tensor)
    torch.testing.assert_close(result, weights @ v)


# -- sink_logits ----------------------------------------------------------------------------------------------------


def test_sink_logits_are_no_score_mod() -> None:
    with pytest.raises(TypeError, match="sink_logits is a term of the softmax, not a score_mod"):
        scores(sink_logits([0.0, 0.0]))


@pytest.mark.parametrize("after", [softcap(2.0), alibi(SLOPES), sink_logits([0.0])], ids=str)
def test_sink_logits_come_last(after: ScoreMod) -> None:
    with pytest.raises(ValueError, match="sink_logits is part of the softmax and must come last"):
        sink_logits([0.0]) >> after


def test_sink_logits_come_last_in_longer_orders() -> None:
    with pytest.raises(ValueError, match="must come last"):
        (softcap(2.0) >> sink_logits([0.0])) >> alibi(SLOPES)


def test_sink_logits_may_end_an_order() -> None:
    assert (softcap(2.0) >> sink_logits([0.0])).parts() == (softcap(2.0), sink_logits([0.0]))


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mod", [mod for mod in EXAMPLES if "<" not in repr(mod)], ids=repr)
def test_repr_is_what_you_would_type(mod: ScoreMod) -> None:
    assert eval(repr(mod), dict(NAMES)) == mod


@every_example
def test_equal_mods_have_equal_hashes(mod: ScoreMod) -> None:
    assert hash(pickle.loads(pickle.dumps(mod))) == hash(mod)


@every_example
def test_pickle_keeps_mods(mod: ScoreMod) -> None:
    assert pickle.loads(pickle.dumps(mod)) == mod


def test_every_example_is_another_value() -> None:
    assert len(set(EXAMPLES)) == len(EXAMPLES)


def test_the_order_matters_for_equality() -> None:
    assert alibi(SLOPES) >> softcap(2.0) != softcap(2.0) >> alibi(SLOPES)


def test_str_shortens_long_tensors() -> None:
    assert str(softcap(2.0) >> alibi(torch.ones(64))) == "softcap(2.0) >> alibi(<float32 [64]>)"


def test_captures_are_listed_once_in_order() -> None:
    mod = alibi(SLOPES) >> log_weight(WEIGHT) >> alibi(SLOPES)
    assert mod.captures() == (Captured.of(SLOPES), Captured.of(WEIGHT))


def test_captures_hold_the_tensors_that_say_where_a_bias_starts() -> None:
    start = Captured.symbol("start")
    assert start in bias(TABLE, q_start=start).captures()


def test_bind_puts_tensors_in_the_place_of_names() -> None:
    name = Captured.symbol("slopes")
    mod = softcap(2.0) >> alibi(name)
    assert mod.bind({name: Captured.of(SLOPES)}) == softcap(2.0) >> alibi(SLOPES)


def test_bind_leaves_other_tensors() -> None:
    mod = alibi(SLOPES) >> log_weight(WEIGHT)
    assert mod.bind({Captured.symbol("slopes"): Captured.of([1.0])}) == mod


# -- errors ---------------------------------------------------------------------------------------------------------


def test_an_unbound_name_says_so() -> None:
    with pytest.raises(ValueError, match="slopes stands for a tensor of the compiled graph: bind"):
        scores(alibi(Captured.symbol("slopes")))


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, math.nan])
def test_softcap_needs_a_cap(cap: float) -> None:
    with pytest.raises(ValueError, match=r"softcap needs a finite cap above 0, got (0\.0|-1\.0|inf|nan)"):
        softcap(cap)


def test_alibi_needs_one_slope_per_head() -> None:
    with pytest.raises(ValueError, match=r"alibi needs slopes of shape \[heads\], got \[1, 2\]"):
        alibi([SLOPES])


def test_log_weight_needs_batches() -> None:
    with pytest.raises(ValueError, match=r"log_weight needs weight of shape \[batch, positions\], got \[4\]"):
        log_weight(WEIGHT[0])


def test_bias_needs_four_axes() -> None:
    with pytest.raises(ValueError, match=r"bias needs bias of shape \[batch, heads, queries, keys\], got \[3, 4\]"):
        bias(TABLE[0, 0])


def test_bias_starts_need_one_axis() -> None:
    with pytest.raises(ValueError, match=r"bias needs q_start of shape \[1\], got \[\]"):
        bias(TABLE, q_start=torch.tensor(3))


def test_sink_logits_need_one_logit_per_head() -> None:
    with pytest.raises(ValueError, match=r"sink_logits needs logits of shape \[heads\], got \[1, 1\]"):
        sink_logits([[0.0]])


def test_only_mods_compose() -> None:
    with pytest.raises(TypeError, match="unsupported operand type"):
        softcap(2.0) >> causal  # type: ignore[operator]
