"""The operands of the kernels that take many: one named structure for each, in a file without Triton.

The schema of an op, its fake and eager forms and the launcher of its kernel all use the same structure. No argument list is
written twice. ``T`` is a tensor where a kernel runs, and a node where a graph is written.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from sparse_compile.passes.storage.codec import Format, QuantizedTensor

T = TypeVar("T")


class Stored(NamedTuple, Generic[T]):
    """Keys or values in pages: plain ``[B', H, N, D]``, or quantized to ``kind`` with float16 scales and offsets.

    ``int8`` and ``int4`` are ``data * scale + offset``; int4 has channel ``c`` in the lower half of a byte and ``c + D / 2`` in
    the upper one. Keys share a scale over neighboring tokens, a power of two from 8, ``[B', H, N / group, D]``, values over
    neighboring channels, ``[B', H, N, D / group]``. ``fp8`` is e4m3, or its bits, with a scale for each token,
    ``[B', H, N, 1]``.
    """

    data: T
    scale: T | None = None
    offset: T | None = None
    kind: str = ""

    @staticmethod
    def of(quantized: QuantizedTensor[T], form: Format) -> Stored[T]:
        """What a cache holds of keys or values, as kernels read it."""
        return Stored(*quantized, form.kind)


class PageRead(NamedTuple, Generic[T]):
    """The pages that a decode step reads.

    They are the first ``counts[b, h, 0]`` of ``table[b, h, 0]``, or all pages if there is no table. ``usual`` is how many that
    usually are; more take longer. The query is at column ``columns``: keys above it are not seen, nor those with a negative
    ``texts[b]``. What is not seen may be NaN.
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

    ``texts`` ``[B, slots]`` is the text position of each slot, negative if it is empty. The query at ``text`` ``[B, 1]`` sees
    the first ``sink`` positions and the last ``recent``, its own included.
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

    KV heads of ``ring.heads`` read the ring and the others the pages; the heads of each keep their order.
    """

    q: T
    pages: PageRead[T] | None
    ring: RingRead[T] | None
    scale: float


class Append(NamedTuple, Generic[T]):
    """New tokens ``k`` and ``v`` ``[B, H, Q, *]`` for quantized pages, at column ``columns``.

    ``key_tail`` and ``value_tail`` ``[max_batch, H, T, *]`` hold the latest tokens as they came. ``texts`` ``[B, N]`` is
    negative for padding, which takes no part in scales. ``summary``, where it is given, receives the summary by ``score`` of
    the pages of ``page`` keys that the tokens went to.
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
    """How pages are scored: pages of ``page_size`` keys, summarized every ``page`` keys by ``score``, pooled over a ``group``.

    They are scored on every ``every``-th column from the anchor on.
    """

    page_size: int
    page: int
    score: str
    group: str
    every: int


class SelectPages(NamedTuple, Generic[T]):
    """One token ``k``, ``v`` ``[B, Hkv, 1, *]`` to append at ``columns``, and the pages to choose for ``q`` ``[B, Hq, 1, D]``.

    ``keys`` and ``values`` ``[B', Hkv, N, *]`` are buffers with column ``n`` in slot ``n % N``; they are tails if there are
    ``key_quantized`` and ``value_quantized``, which are written as well. ``summary`` ``[B', Hkv, L, width]`` summarizes pages,
    and ``scores`` ``[B', Hkv, P]`` ranks them. Pages are chosen when they were scored and when ``changed`` (int32 ``[1]``) says
    that their ``classes`` changed; until then ``counts`` ``[B', Hkv, 1]`` and ``table`` ``[B', Hkv, 1, width]`` stay.
    ``counts`` must be zeros at first: programs count themselves in the upper halves. ``anchor`` is the column that steps of
    scoring are counted from. ``texts`` ``[B, N]`` is negative where a column is padding. ``budget`` is a number of pages.
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
