"""Passkey texts have the right length, announce passkeys before they ask for them, and depend only on the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.calibration import Passkeys
from sparse_compile.calibration.passkey_data import WORDS
from support.word_tokenizer import word_tokenizer

TEXT = "one two three four five six seven " * 20


def places(tokens: list[int], piece: list[int]) -> list[int]:
    return [at for at in range(len(tokens) - len(piece) + 1) if tokens[at : at + len(piece)] == piece]


def assert_told_then_asked(data: Passkeys, tokens: Tensor, asked: Tensor) -> None:
    """Assert that the tail has all questions and passkeys in order, and that each is announced between 5 % and 95 %."""
    text = tokens[0].tolist()
    start = text_start = int(asked[0].int().argmax())
    assert asked[0].tolist() == [False] * start + [True] * (len(text) - start), "what is asked is the tail"
    told_tokens = sum(len(a) for a in data.announcing) + len(text) - start - sum(len(q) for q in data.asking)
    hay = start - told_tokens - data.opening.numel()
    context = text[:text_start]
    found = []
    for announcing, asking in zip(data.announcing, data.asking, strict=True):
        assert text[start : start + len(asking)] == asking.tolist()
        start += len(asking)
        key = []
        for _ in range(data.size):
            word = next(w.tolist() for w in data.words if text[start : start + len(w)] == w.tolist())
            key += word
            start += len(word)
        at = places(context, announcing.tolist() + key)
        assert len(at) == 1, "told once"
        found.append((at[0], at[0] + len(announcing) + len(key)))
    assert start == len(text)
    before = data.opening.numel()
    for begin, end in sorted(found):
        hidden = (begin - before) / hay  # the share of the haystack before it
        before += end - begin
        assert 0.05 - 1 / hay <= hidden <= 0.95


@given(
    vocabulary=st.integers(40, 300),
    count=st.integers(1, 5),
    size=st.integers(1, 9),
    room=st.integers(1, 90),
    more=st.integers(0, 300),
    seed=st.integers(-5, 10**6),
    step=st.integers(0, 10**6),
)
def test_random_tokens_are_told_then_asked(**sizes: int) -> None:
    count, size, step = sizes["count"], sizes["size"], sizes["step"]
    shortest = count * (2 * size + 2) + sizes["room"]
    longest = shortest + sizes["more"]
    data = Passkeys.of_tokens(
        sizes["vocabulary"], longest=longest, shortest=shortest, count=count, size=size, seed=sizes["seed"]
    )
    tokens, asked = data(step)
    assert tokens.shape == asked.shape
    assert (tokens.dtype, asked.dtype) == (torch.int64, torch.bool)
    assert shortest <= tokens.shape[1] <= longest
    assert int(asked.sum()) == count * (size + 1)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < sizes["vocabulary"]
    assert_told_then_asked(data, tokens, asked)


@given(count=st.integers(1, 10), size=st.integers(1, 8), more=st.integers(1, 200), step=st.integers(0, 99))
def test_words_are_told_then_asked(count: int, size: int, more: int, step: int) -> None:
    data = Passkeys.of_text(word_tokenizer(), TEXT, longest=2000, shortest=1999, count=count, size=size)
    data = data.fit(data.told + more, data.told + 2 * more)
    tokens, asked = data(step)
    assert_told_then_asked(data, tokens, asked)


def test_a_text_reads_as_published() -> None:
    tokenizer = word_tokenizer()
    data = Passkeys.of_text(tokenizer, TEXT, longest=120, shortest=120, count=2, size=3)
    tokens, asked = data(0)
    text, tail = tokenizer.decode(tokens[0]), tokenizer.decode(tokens[asked])
    assert text.startswith("<s> ")
    assert text.count("<s>") == 1
    assert "<unk>" not in text
    first, second = (tail.split("It is :")[at].split("What")[0].split() for at in (1, 2))
    both = (("first", first), ("second", second))
    questions = (f"What is the {name} passkey ? It is : {' '.join(key)}" for name, key in both)
    assert tail == " ".join(questions)
    assert len(first) == len(second) == 3
    assert {*first, *second} <= set(WORDS)
    for name, key in both:
        assert f"Remember this , the {name} passkey is : {' '.join(key)} " in text


def test_a_tokenizer_without_a_first_token_opens_with_the_haystack() -> None:
    data = Passkeys.of_text(word_tokenizer(bos=False), TEXT, longest=120, shortest=120, count=1, size=3)
    assert data.opening.numel() == 0
    assert_told_then_asked(data, *data(3))


def test_words_of_many_tokens_are_told_whole() -> None:
    data = Passkeys.of_text(word_tokenizer(letters=True), TEXT, longest=900, shortest=700, count=2, size=4)
    for step in range(5):
        assert_told_then_asked(data, *data(step))


def test_a_step_is_the_same_text_and_no_other_step_is() -> None:
    data, again, other = (Passkeys.of_tokens(64, longest=300, shortest=100, count=2, size=4, seed=s) for s in (3, 3, 4))
    torch.manual_seed(1)
    texts = [data(step) for step in range(20)]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    for step in reversed(range(20)):
        tokens, asked = again(step)
        assert torch.equal(tokens, texts[step][0])
        assert torch.equal(asked, texts[step][1])
    assert torch.equal(torch.get_rng_state(), before), "the random numbers of others are left alone"
    assert len({tuple(tokens[0].tolist()) for tokens, _ in [*texts, *map(other, range(20))]}) == 40


def test_lengths_go_from_the_shortest_to_the_longest_in_fifty_steps() -> None:
    data = Passkeys.of_tokens(64, longest=590, shortest=100, count=1, size=4)
    assert {data(step)[0].shape[1] for step in range(800)} == set(range(100, 591, 10))


def test_passkeys_stand_everywhere_and_in_any_order() -> None:
    data = Passkeys.of_tokens(256, longest=400, shortest=400, count=2, size=4)
    first, second = (mark.item() for mark in data.announcing)
    found = [(text.index(first), text.index(second)) for text in (data(step)[0][0].tolist() for step in range(200))]
    assert {a < b for a, b in found} == {True, False}
    depths = [at / 390 for pair in found for at in pair]
    assert min(depths) < 0.1
    assert max(depths) > 0.85


@pytest.mark.parametrize("changes", [{"shortest": 40}, {"longest": 60}, {"count": 9}, {"size": 30}])
def test_too_little_room_is_refused(changes: dict[str, int]) -> None:
    sizes: dict[str, Any] = {"longest": 100, "shortest": 80, "count": 4, "size": 4} | changes
    with pytest.raises(ValueError, match=r"need room for more than the \d+ tokens of \d passkeys: use longer texts"):
        Passkeys.of_tokens(64, **sizes)


@pytest.mark.parametrize("changes", [{"count": 0}, {"size": 0}])
def test_nothing_to_ask_is_refused(changes: dict[str, int]) -> None:
    sizes: dict[str, Any] = {"longest": 100, "shortest": 80, "count": 2, "size": 4} | changes
    with pytest.raises(ValueError, match=r"count >= 1"):
        Passkeys.of_tokens(64, **sizes)


def test_a_text_without_words_and_more_than_ten_passkeys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"count >= 1, size >= 1 and a text to hide them in, got 10 of 32 words in 0"):
        Passkeys.of_text(word_tokenizer(), "")
    with pytest.raises(ValueError, match=r"passkeys are named first to tenth, so there can be at most 10, got 11: hide fewer"):
        Passkeys.of_text(word_tokenizer(), TEXT, count=11)


def test_a_vocabulary_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10 passkeys need a vocabulary of 22 tokens, got 21: hide fewer"):
        Passkeys.of_tokens(21)


def test_passkeys_fit_texts_with_as_many_as_have_room() -> None:
    data = Passkeys.of_text(word_tokenizer(), TEXT)
    assert (len(data.fit(1000, 32000).asking), data.fit(1000, 32000).shortest) == (10, 2 * data.told)
    assert 1 < len(data.fit(100, 400).asking) < 10
    for longest in (200, 500, 1000):
        fitted = data.fit(100, longest)
        assert_told_then_asked(fitted, *fitted(0))
    with pytest.raises(ValueError, match="tokens of 1 passkeys"):
        data.fit(50, 60)


def test_a_digest_tells_texts_apart_that_begin_alike() -> None:
    made: dict[str, Any] = {"longest": 192, "shortest": 96, "count": 2, "size": 4}
    data = Passkeys.of_tokens(64, **made)
    assert data.digest == Passkeys.of_tokens(64, **made).digest
    others = [replace(data, longest=193), replace(data, seed=7), replace(data, words=data.words[:-1])]
    others.append(replace(data, haystack=data.haystack[:-1]))
    assert len({data.digest, *(other.digest for other in others)}) == 5
