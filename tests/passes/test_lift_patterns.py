"""The masks of pictures, video, packed texts and block diffusion are lifted from what models write, pair by pair."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sparse_compile.masks
from support.comparison import assert_read, compare, qkv
from support.masks.builders import N, attend, i_and_j

NAMES = {name: getattr(sparse_compile.masks, name) for name in sparse_compile.masks.__all__}
PROMPT, FRAME, WIDTH = 2, 5, 2  # of a video: text tokens, tokens of a frame, and places that a token sees


def dilated_window() -> Tensor:
    i, j = i_and_j()
    return (i - j >= 0) & (i - j <= 6) & ((i - j) % 3 == 0)


def block_causal() -> Tensor:
    i, j = i_and_j()
    return i // 4 >= j // 4


def tiles_of_other_sizes() -> Tensor:
    i, j = i_and_j()
    return (i // 4 - j // 2).abs() <= 1


def sparse_transformer_columns() -> Tensor:
    i, j = i_and_j()
    return ((i // 4 == j // 4) | (j % 4 == 3)) & (j <= i)


def spatial_head() -> Tensor:
    i, j = i_and_j()
    return (j < PROMPT) | (i < PROMPT) | ((i - j).abs() < WIDTH * 2)


def temporal_head() -> Tensor:
    i, j = i_and_j()
    near = ((i - PROMPT) % FRAME - (j - PROMPT) % FRAME).abs() < WIDTH
    return (j < PROMPT) | (i < PROMPT) | near


def global_tokens() -> Tensor:
    i, j = i_and_j()
    return (i < 1) | (j < 1) | ((i - j).abs() <= 2)


def block_diffusion() -> Tensor:
    """Noised blocks come first and clean ones behind them; a noised block sees itself and the clean blocks before it."""
    i, j = i_and_j()
    half, block = N // 2, 3
    own = (i < half) & (j < half) & (i // block == j // block)
    before = (i < half) & (j >= half) & (i // block > (j - half) // block)
    clean = (i >= half) & (j >= half) & ((i - half) // block >= (j - half) // block)
    return own | before | clean


def natten() -> Tensor:
    """A window of 3 x 3 on a grid of 3 x 4, moved inward at the borders."""
    i, j = i_and_j()
    x, y = (i // 4).clamp(1, 1), (i % 4).clamp(1, 2)
    return ((x - j // 4).abs() <= 1) & ((y - j % 4).abs() <= 1)


def sliding_tiles() -> Tensor:
    """A window of three tiles of two tokens, moved inward at the borders."""
    i, j = i_and_j()
    center, tile = (i // 2).clamp(1, 4), j // 2
    return (tile >= center - 1) & (tile <= center + 1)


def last_distances() -> Tensor:
    i, j = i_and_j()
    return (j <= i) & ((i - j) % 5 <= 1)


def hidden_corner() -> Tensor:
    i, j = i_and_j()
    return ~((i < 4) & (j < 4))


CASES: dict[str, tuple[Callable[[], Tensor], str]] = {
    "a dilated window": (dilated_window, "causal & sliding_window(7) & periodic(chunked(1), 3)"),
    "block-causal": (block_causal, "coarse(causal, q=4, kv=4)"),
    "tiles of other sizes": (tiles_of_other_sizes, "coarse(dilated(2, 1), q=4, kv=2)"),
    "columns of a sparse transformer": (sparse_transformer_columns, "causal & (chunked(4) | strided(4, offset=3))"),
    "a spatial head": (spatial_head, "sink(2) | of_queries(sink(2)) | dilated(4, 1)"),
    "a temporal head": (
        temporal_head,
        "sink(2) | of_queries(sink(2)) | shifted(repeated(dilated(2, 1), 5), q=-3, kv=-3)",
    ),
    "global tokens": (global_tokens, "of_queries(sink(1)) | sink(1) | dilated(3, 1)"),
    "distances modulo a number": (last_distances, "causal & periodic(causal & sliding_window(2), 5)"),
    "a hidden corner": (hidden_corner, "~(of_queries(sink(4)) & sink(4))"),
    "the diagonal": (lambda: i_and_j()[0] == i_and_j()[1], "chunked(1)"),
    "one key": (lambda: (i_and_j()[1] == 3).expand(N, N), "sink(4) & ~sink(3)"),
    "every third query": (
        lambda: (i_and_j()[0] % 3 == 1).expand(N, N) | (i_and_j()[1] < 1),
        "of_queries(strided(3, offset=1)) | sink(1)",
    ),
    "places in a chunk": (lambda: i_and_j()[1] % 4 <= i_and_j()[0] % 4, "repeated(causal, 4)"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pattern_is_lifted(name: str) -> None:
    build, mask = CASES[name]
    assert_read(compare(attend(build), *qkv(N)), mask)
    assert torch.equal(eval(mask, dict(NAMES)).dense(N, N)[0, 0], build())


def of_ids(ids: Tensor) -> Tensor:
    return ids[:, None] == ids[None, :]


def of_two_ids(q_ids: Tensor, kv_ids: Tensor) -> Tensor:
    """Flamingo: a text token sees the image before it."""
    return (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]


def of_offsets(offsets: Tensor) -> Tensor:
    """Packed causal texts, whose documents are counted from their first positions."""
    ids = torch.bucketize(torch.arange(N), offsets, right=True)
    i, j = i_and_j()
    return (ids[:, None] == ids[None, :]) & (j <= i)


def test_ids_without_a_batch_are_documents() -> None:
    ids = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    assert_read(compare(attend(of_ids), *qkv(N), ids), "document")


def test_ids_of_queries_and_keys_are_documents() -> None:
    q_ids, kv_ids = torch.tensor([[0] * 5 + [1] * 7] * 2), torch.tensor([[0] * 4 + [1] * 4] * 2)
    assert_read(compare(attend(of_two_ids), *qkv(N, 8), q_ids, kv_ids), "documents")


def test_packed_causal_texts_are_documents() -> None:
    assert_read(compare(attend(of_offsets), *qkv(N), torch.tensor([5, 9])), "causal & document")


def test_a_kernel_takes_a_lifted_pattern() -> None:
    result = compare(attend(temporal_head), *qkv(N), inner="inductor")
    assert_read(result, CASES["a temporal head"][1])
    assert [site.kernel for site in result.report.rewritten] == ["FlexAttention"]
