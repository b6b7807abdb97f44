"""Quantized values equal those of loops over single groups, and dequantize to within half a step of the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sparse_compile as sc
from sparse_compile.passes.storage.codec import KINDS, LEVELS, Format, QuantizedTensor, dequantize, quantize
from sparse_compile.passes.storage.graph_text import from_text, to_text
from support.oracles import formats as oracle

FORMS = [
    Format("int8", 32, 1),  # the default formats of keys and values for a head_dim of 16
    Format("int8", 1, 16),
    Format("int8", 1, 0),
    Format("int8", 8, 4),
    Format("int8", 64, 16),
    Format("int4", 32, 1),
    Format("int4", 1, 8),
    Format("int4", 1, 2),
    Format("int4", 4, 4),
    Format("fp8"),
]
SOME_OF_EACH = [Format("int8", 4, 1), Format("int4", 1, 4), Format("int4", 8, 2), Format("fp8")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some(batch: int, tokens: int) -> Tensor:
    """A random bool mask of valid tokens ``[batch, tokens]``: about half of them, but none of the first 32."""
    valid = random(batch, tokens, seed=1) < 0
    valid[:, :32] = False
    return valid


def unlike_channels() -> Tensor:
    return random(2, 2, 64, 16) * torch.logspace(-1, 1, 16) + torch.linspace(-9, 9, 16)


def there_and_back(x: Tensor, form: Format, valid: Tensor | None = None) -> Tensor:
    return dequantize(quantize(x, valid, form), form, torch.float32)


def same(a: QuantizedTensor[Tensor], b: QuantizedTensor[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.used(), b.used(), strict=True))


# -- against loops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_steps_reach_from_the_least_to_the_largest_number_of_a_group(form: Format, masked: bool) -> None:
    """The offset is the smallest number and the scale spans the range, up to float16 rounding of 11 bits."""
    x, valid = unlike_channels(), some(2, 64) if masked else None
    scales, offsets = oracle.steps(x, valid, form)
    quantized = quantize(x, valid, form)
    got, least = oracle.scales_of(quantized.used(), form)
    assert (quantized.offset is None) == (form.kind == "fp8")
    assert np.array_equal(least, offsets)
    assert np.all(np.abs(got - scales) <= scales * 2**-10 + np.abs(offsets) * 2**-11 / 15 + 2**-24)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_are_those_of_loops(form: Format, masked: bool) -> None:
    """If two quantized values are equally near a number, either one is right."""
    x, valid = unlike_channels(), some(2, 64) if masked else None
    quantized = quantize(x, valid, form)
    steps = oracle.scales_of(quantized.used(), form)
    got, wanted, there = oracle.unpacked(quantized.data, form), oracle.encode(x, valid, *steps, form), x.double().numpy()
    far, best = (np.abs(oracle.decode(each, *steps, form) - there) for each in (got, wanted))
    assert np.all((got == wanted) | (np.abs(far - best) <= 1e-6 * np.abs(there)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_numbers_are_those_of_loops(form: Format) -> None:
    parts = []
    for shape, dtype in form.parts(2, 64, 16, torch.float32):
        drawn = random(1, *shape)
        parts.append(drawn.half() if dtype == torch.float16 else (drawn * 50 + 128).clamp(0, 255).to(torch.uint8))
    if form.kind == "fp8":
        parts[0] = torch.where(parts[0] & 127 == 127, 0, parts[0])  # removes NaN
    got = dequantize(QuantizedTensor(*parts), form, torch.float32)
    assert (got - oracle.read(parts, form)).abs().max() < 1e-6 * got.abs().max()


def test_a_byte_of_int4_has_a_channel_of_each_half() -> None:
    x = torch.tensor([0.0, 1, 2, 15, 15, 3, 0, 7]).view(1, 1, 1, 8)
    quantized = quantize(x, None, Format("int4"))
    assert quantized.data.flatten().tolist() == [0 + 16 * 15, 1 + 16 * 3, 2 + 16 * 0, 15 + 16 * 7]


def test_fp8_keeps_small_numbers_beside_a_large_one() -> None:
    """Each number has a precision of four bits, as in e4m3; numbers are not multiples of one step."""
    x = torch.tensor([100.0, 1.2, 0.3, -0.1]).view(1, 1, 1, 4)
    assert ((there_and_back(x, Format("fp8")) - x).abs() / x.abs()).max() < 2**-4


def test_plain_numbers_stay_as_they_are() -> None:
    x = random(1, 2, 8, 4)
    quantized = quantize(x, None, Format())
    assert quantized.used() == [x]
    assert torch.equal(dequantize(quantized, Format(), torch.bfloat16), x.bfloat16())


# -- properties ---------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """A tensor ``[B, H, N, D]`` of whole groups of a format, and its valid tokens."""

    form: Format
    x: Tensor
    valid: Tensor


@st.composite
def forms(draw: st.DrawFn, kinds: Sequence[str] = KINDS) -> Format:
    kind = draw(st.sampled_from(kinds))
    if kind == "fp8":
        return Format(kind)
    tokens = draw(st.sampled_from([1, 2, 4, 32]))
    return Format(kind, tokens, draw(st.sampled_from([0, 2, 8] if tokens == 1 else [0, 1, 2, 8])))


@st.composite
def drawn(draw: st.DrawFn, kinds: Sequence[str] = KINDS) -> Drawn:
    form, batch, heads = draw(forms(kinds)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    tokens, dim = form.tokens * draw(st.integers(1, 4)), 8 * draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(batch, heads, tokens, dim, generator=generator) * 10 ** draw(st.floats(-1, 4))
    x += torch.randn(dim, generator=generator) * 10 ** draw(st.floats(-1, 4))
    return Drawn(form, x, torch.rand(batch, tokens, generator=generator) < draw(st.floats(0, 1)))


def half_a_step(x: Tensor, form: Format) -> Tensor:
    """The error bound of a quantized number: half a step plus the rounding of the offset."""
    grouped = x.unflatten(3, (-1, form.channels or x.shape[3])).unflatten(2, (-1, form.tokens))
    least, largest = grouped.amin(dim=(3, 5), keepdim=True), grouped.amax(dim=(3, 5), keepdim=True)
    offset = least.abs() * 2**-11
    step = (largest - least + offset) / LEVELS[form.kind] * (1 + 2**-10)
    half: Tensor = (step / 2 + offset).expand(grouped.shape).reshape(x.shape)
    return half + 1e-6 * x.abs() + 2**-24


@given(drawn(["int8", "int4"]))
def test_a_number_is_within_half_a_step_of_its_code(drawn: Drawn) -> None:
    form, x = drawn.form, drawn.x.clamp(-65504, 65504)
    assert bool(((there_and_back(x, form) - x).abs() <= half_a_step(x, form)).all())


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("form", [Format("int8", 32, 1), Format("int8", 1, 0), Format("int4", 32, 1)], ids=str)
def test_a_small_number_is_within_half_a_step_of_its_code(form: Format, size: float) -> None:
    """This holds where float16 has few bits for a scale. Steps are never too short to reach the largest number."""
    x = random(1, 1, 32, 16) * size
    assert bool(((there_and_back(x, form) - x).abs() <= half_a_step(x, form)).all())


@given(drawn(["fp8"]))
def test_a_number_of_fp8_is_within_half_of_its_last_bit(drawn: Drawn) -> None:
    """The bound is a sixteenth of the number, or 2**-10 of the scale for the smallest numbers of a token."""
    least = drawn.x.abs().amax(dim=3, keepdim=True) / 448 * 2**-10
    assert bool(((there_and_back(drawn.x, drawn.form) - drawn.x).abs() <= torch.maximum(drawn.x.abs() * 2**-4, least)).all())


@given(drawn())
def test_parts_are_of_the_shapes_that_a_cache_allocates(drawn: Drawn) -> None:
    form, x, _ = drawn
    batch, heads, tokens, dim = x.shape
    made = [((*part.shape,), part.dtype) for part in quantize(x, None, form).used()]
    assert made == [((batch, *shape), dtype) for shape, dtype in form.parts(heads, tokens, dim, torch.float32)]
    assert len(made) == form.count


@given(drawn(), st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e30, -65504.0]))
def test_tokens_that_do_not_count_have_no_say(drawn: Drawn, hidden: float) -> None:
    form, x, valid = drawn
    other = torch.where(valid[:, None, :, None], x, hidden)
    assert same(quantize(x, valid, form), quantize(other, valid, form))


@given(drawn(["int8", "int4"]))
def test_tokens_that_count_are_as_near_as_without_the_others(drawn: Drawn) -> None:
    form, x, there = drawn.form, drawn.x.clamp(-65504, 65504), drawn.valid[:, None, :, None]
    least, largest = (
        torch.where(there, x, sign * torch.inf).unflatten(2, (-1, form.tokens)).mul(sign).amin(dim=3).mul(sign)
        for sign in (1, -1)
    )
    between = torch.where(least <= largest, least, 0).repeat_interleave(form.tokens, dim=2)
    far = (there_and_back(x, form, drawn.valid) - x).abs()
    assert bool((~there | (far <= half_a_step(torch.where(there, x, between), form))).all())


@given(drawn(), st.sampled_from([torch.nan, torch.inf, 1e4]), st.integers(0, 2**20))
def test_a_number_has_no_say_in_other_groups(drawn: Drawn, value: float, seed: int) -> None:
    form, x, _ = drawn
    at = [int(n) for n in (random(4, seed=seed).abs() * 1000).long() % torch.tensor(x.shape)]
    changed = x.clone()
    changed[tuple(at)] = value
    before, after = there_and_back(x, form), there_and_back(changed, form)
    channels = form.channels or x.shape[3]
    mine = torch.zeros(x.shape, dtype=torch.bool)
    token, channel = at[2] // form.tokens * form.tokens, at[3] // channels * channels
    mine[at[0], at[1], token : token + form.tokens, channel : channel + channels] = True
    assert torch.equal(before[~mine], after[~mine])


@given(forms())
def test_a_format_is_read_back_from_its_text(form: Format) -> None:
    assert from_text(to_text(form)) == form
    assert from_text(to_text(Format())) == Format()


# -- special numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SOME_OF_EACH, ids=str)
def test_zeros_stay_zeros(form: Format) -> None:
    x = torch.zeros(1, 2, 8, 4)
    assert torch.equal(there_and_back(x, form), x)


@pytest.mark.parametrize("value", [1.0, -3.0, 0.5, 1e4, -1e4, 1.001, 2.0**-20])
@pytest.mark.parametrize("form", SOME_OF_EACH, ids=str)
def test_equal_numbers_stay_equal_and_keep_what_float16_has_of_them(form: Format, value: float) -> None:
    """In ``fp8`` the largest number of a token is as exact as its scale."""
    x = torch.full((1, 2, 8, 4), value)
    got = there_and_back(x, form)
    assert torch.equal(got, got.flatten()[0].expand_as(got))
    assert abs(float(got.flatten()[0]) - value) <= abs(value) * 2**-11 + 2**-25


@pytest.mark.parametrize("form", [Format("int8", 4, 1), Format("int4", 8, 1)], ids=str)
def test_channels_that_are_each_constant_stay_as_they_are(form: Format) -> None:
    x = (2.0 ** torch.arange(-4, 4)).expand(1, 2, 8, 8)
    assert torch.equal(there_and_back(x, form), x)


@pytest.mark.parametrize("form", SOME_OF_EACH, ids=str)
def test_numbers_of_ten_thousand_are_kept_as_well_as_those_of_one(form: Format) -> None:
    x = random(1, 2, 64, 8)
    small, large = there_and_back(x, form), there_and_back(x * 1e4, form)
    assert abs(float((large / 1e4 - x).norm() / x.norm()) - float((small - x).norm() / x.norm())) < 2e-3


@pytest.mark.parametrize("form", [Format("int8", 4, 1), Format("int4", 1, 4)], ids=str)
def test_numbers_beyond_float16_are_cut_off(form: Format) -> None:
    """Groups without such numbers do not change."""
    x = random(1, 2, 8, 4)
    x[:, :, 4:] *= 1e6
    got = there_and_back(x, form)
    assert torch.isfinite(got).all() and got[:, :, 4:].min() >= -65504
    assert torch.equal(got[:, :, :4], there_and_back(x[:, :, :4], form))


@pytest.mark.parametrize("form", SOME_OF_EACH, ids=str)
def test_a_single_token_of_a_page_is_kept_as_if_there_were_no_other(form: Format) -> None:
    x, valid = random(1, 2, 8, 4), torch.arange(8)[None] == 5
    alike = x[:, :, 5:6].expand(1, 2, 8, 4)
    assert torch.equal(there_and_back(x, form, valid)[:, :, 5], there_and_back(alike, form)[:, :, 5])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_group_may_be_a_single_number(kind: str) -> None:
    """Keys are grouped like this if a page has one token."""
    x = random(1, 2, 8, 4)
    assert torch.equal(there_and_back(x, Format(kind, 1, 1)).half(), x.half())


@pytest.mark.parametrize("form", SOME_OF_EACH, ids=str)
def test_a_page_without_tokens_is_zero(form: Format) -> None:
    got = there_and_back(random(1, 2, 8, 4), form, torch.zeros(1, 8, dtype=torch.bool))
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", SOME_OF_EACH, ids=str)
def test_numbers_of_16_bits_are_encoded_as_their_float32_is(form: Format, dtype: torch.dtype) -> None:
    x = random(1, 2, 8, 4).to(dtype)
    quantized = quantize(x, None, form)
    assert same(quantized, quantize(x.float(), None, form))
    assert torch.equal(dequantize(quantized, form, dtype), dequantize(quantized, form, torch.float32).to(dtype))


# -- error of attention -------------------------------------------------------------------------------------------------


def attention_error(kv: sc.KVFormat, *, outliers: int) -> float:
    """The relative error of attention to 4096 keys of 128 channels, ``outliers`` of which are ten times larger."""
    q, k, v = random(1, 2, 64, 128), random(1, 2, 4096, 128, seed=1), random(1, 2, 4096, 128, seed=2)
    k[..., torch.randperm(128, generator=torch.Generator().manual_seed(3))[:outliers]] *= 10
    forms = kv.forms(128, 128, page_size=64)
    assert forms is not None
    exact, got = (
        (q @ keys.transpose(2, 3) / 128**0.5).softmax(dim=-1) @ values
        for keys, values in ((k, v), [there_and_back(x, form) for x, form in zip((k, v), forms, strict=True)])
    )
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("kv", "outliers", "most"),
    [
        (sc.KVFormat("int8", "int8"), 0, 0.01),
        (sc.KVFormat("int8", "int8"), 3, 0.01),
        (sc.KVFormat("fp8", "fp8"), 0, 0.04),
        (sc.KVFormat("int4", "int4"), 0, 0.12),
        (sc.KVFormat("int8", "int4"), 3, 0.12),
    ],
    ids=str,
)
def test_attention_is_near_that_to_the_numbers_themselves(kv: sc.KVFormat, outliers: int, most: float) -> None:
    """Two formats exceed these bounds if 2 % of the channels are outliers, so they are not tested there:

    | format | error over several seeds |
    |--------|--------------------------|
    | fp8    | 4.7 to 6.4 %             |
    | int4   | 11.5 to 14.7 %           |
    """
    found = attention_error(kv, outliers=outliers)
    assert most / 4 < found <= most
