"""The operands of the larger kernels: one named structure for each. This file does not import Triton.

The schema of an op, its fake and eager forms and the launcher of its kernel all use the same structure, so no argument list is
written twice. ``T`` is a tensor where a kernel runs, and a node where a graph is written.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from sparse_compile.passes.storage.codec import Format, QuantizedTensor

T = TypeVar("T")


class Stored(NamedTuple, Generic[T]):
    """Keys or values in pages: plain ``[B', H, N, D]``, or quantized to ``kind`` with float16 scales and offsets.

    ``int8`` and ``int4`` stand for ``data * scale + offset``. int4 has channel ``c`` in the lower half of a byte and channel
    ``c + D / 2`` in the upper half. ``fp8`` is e4m3 or its bits. The shapes of the scales:

    | data                 | numbers that share a scale                      | shape of the scales       |
    |----------------------|-------------------------------------------------|---------------------------|
    | int8 and int4 keys   | neighboring tokens: a power of two, at least 8  | ``[B', H, N / group, D]`` |
    | int8 and int4 values | neighboring channels                            | ``[B', H, N, D / group]`` |
    | fp8                  | all channels of a token                         | ``[B', H, N, 1]``         |
    """

    data: T
    scale: T | None = None
    offset: T | None = None
    kind: str = ""

    @staticmethod
    def of(quantized: QuantizedTensor[T], form: Format) -> Stored[T]:
        """Return the cached keys or values in the form that kernels read."""
        return Stored(*quantized, form.kind)


class PageRead(NamedTuple, Generic[T]):
    """The pages that a decode step reads.

    These are the first ``counts[b, h, 0]`` pages of ``table[b, h, 0]``, or all pages if there is no table. ``usual`` is the
    usual number of pages; more pages are correct but slower. The query is at column ``columns``. It does not see keys above
    that column, nor keys with a negative ``texts[b]``. Keys and values that are not seen may be NaN.
    """

    keys: Stored[T]
    values: Stored[T]
    counts: T | None
    table: T | None
    columns: T
    texts: T | None
    page_size: int
    usual: int


class RingRead(NamedTuple, Generic[T]):
    """The ring that a decode step reads: plain keys and values ``[B', H, slots, D]`` of the KV heads ``heads``.

    ``texts`` ``[B, slots]`` is the text position of each slot, negative if the slot is empty. The query at text position
    ``text`` ``[B, 1]`` sees the first ``sink`` positions and the last ``recent`` positions, including its own.
    """

    keys: T
    values: T
    texts: T
    text: T
    sink: int
    recent: int
    heads: list[int]


class PagedDecode(NamedTuple, Generic[T]):
    """Attention of one query of each sequence, ``q`` ``[B, Hq, 1, D]``, to pages, a ring, or both.

    The KV heads ``ring.heads`` read the ring, and all other KV heads read the pages. Both groups keep the order of the heads.
    """

    q: T
    pages: PageRead[T] | None
    ring: RingRead[T] | None
    scale: float


class Append(NamedTuple, Generic[T]):
    """New tokens ``k`` and ``v`` ``[B, H, Q, *]`` to append to quantized pages from column ``columns`` on.

    ``key_tail`` and ``value_tail`` ``[max_batch, H, T, *]`` hold the latest tokens unquantized. ``texts`` ``[B, N]`` is
    negative for padding, which does not affect scales. If ``summary`` is not None, the pages of ``page`` keys that receive
    tokens are summarized by ``score``, and their summaries are written to it.
    """

    key_tail: T
    value_tail: T
    keys: QuantizedTensor[T]
    values: QuantizedTensor[T]
    summary: T | None
    k: T
    v: T
    columns: T
    texts: T | None
    key_form: Format
    value_form: Format
    page: int
    score: str


class PageScoring(NamedTuple):
    """How pages of ``page_size`` keys are scored.

    Every ``page`` keys have a summary by ``score``. ``group`` says how scores are pooled over the query heads of a KV head.
    Pages are scored on every ``every``-th column from the anchor on.
    """

    page_size: int
    page: int
    score: str
    group: str
    every: int


class SelectPages(NamedTuple, Generic[T]):
    """One token ``k``, ``v`` ``[B, Hkv, 1, *]`` to append at ``columns``, and the state that selects pages for its query ``q``.

    - ``q``: ``[B, Hq, 1, D]``.
    - ``keys``, ``values``: buffers ``[B', Hkv, N, *]`` with column ``n`` in slot ``n % N``. They are tails if there are
      ``key_quantized`` and ``value_quantized``, which are written as well.
    - ``summary``: page summaries ``[B', Hkv, L, width]``. ``scores`` ``[B', Hkv, P]`` ranks the pages.
    - ``counts``, ``table``: the selected pages, ``[B', Hkv, 1]`` and ``[B', Hkv, 1, width]``. ``counts`` must be zeros at
      first, because programs count themselves in the upper halves. Pages are selected after they were scored, and when
      ``changed`` (int32 ``[1]``) says that their ``classes`` changed. Until then, both tensors stay as they are.
    - ``anchor``: the column from which the steps that score are counted.
    - ``texts``: ``[B, N]``, negative where a column is padding.
    - ``budget``: a number of pages.
    """

    keys: T
    values: T
    summary: T
    scores: T
    counts: T
    table: T
    key_quantized: QuantizedTensor[T] | None
    value_quantized: QuantizedTensor[T] | None
    q: T
    k: T
    v: T
    classes: T
    columns: T
    anchor: T
    changed: T
    texts: T | None
    how: PageScoring
    budget: int
    key_form: Format
    value_form: Format
