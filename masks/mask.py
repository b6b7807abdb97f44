"""The base class of masks: a value that says which (query, key) pairs may attend, with the operators ``&``, ``|``, ``~``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sparse_compile.masks.bounds import Bounds
from sparse_compile.masks.captured import Captured

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.nn.attention.flex_attention import BlockMask

V = TypeVar("V", bound=Callable[..., Any])


class Views:
    """Hold the functions behind the methods of ``Mask`` that need patterns, operators or viewers.

    The files of these functions import ``Mask``, so this file cannot import them. They register their functions when
    ``masks`` is imported.
    """

    both: Callable[[Mask, Mask], Mask]
    either: Callable[[Mask, Mask], Mask]
    negated: Callable[[Mask], Mask]
    block_mask: Callable[..., BlockMask]
    selected: Callable[..., Mask]
    density: Callable[..., float]
    draw: Callable[..., str]
    plot: Callable[..., Figure]
    to_json: Callable[[Mask], str]
    from_json: Callable[[str], Mask]


VIEWS = Views()


def view(function: V) -> V:
    """Register ``function`` under its name in ``VIEWS``, where the methods of ``Mask`` find it."""
    setattr(VIEWS, function.__name__, function)
    return function


Index = Any  # an int, a scalar tensor under vmap, or a broadcasting index tensor; masks must accept all three


@dataclass(frozen=True, repr=False)
class Mask(ABC):
    """Says which (query, key) pairs may attend, as a function of batch, head, query position and key position.

    A mask is a FlexAttention ``mask_mod`` and also a plain value. It prints as the code that builds it, with a dtype and a
    shape in place of a long tensor, and it can be compared, hashed, pickled, and converted to JSON and back. Positions are
    text positions: 0 is the first token.

        >>> from sparse_compile.masks import causal, sink, sliding_window
        >>> streaming = causal & (sink(1) | sliding_window(2))
        >>> streaming
        causal & (sink(1) | sliding_window(2))
        >>> print(streaming.draw(4, 4))
        █···
        ██··
        ███·
        █·██

    A new pattern implements two methods. ``__call__`` says whether a pair is visible. ``bounds`` says which keys some query
    of a run may see, and which keys all queries of the run surely see. The defaults of all other methods use these two.
    """

    name: ClassVar[str]
    tightness: ClassVar[int] = 4  # precedence in printed masks; operators have a lower one
    selects: ClassVar[bool] = False  # whether visibility depends on the values of queries and keys

    @abstractmethod
    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        """Return whether the pair is visible. Integers, scalars under ``vmap`` and broadcasting index tensors all work.

        Masks that call other masks write ``mask.__call__(...)``. Dynamo in torch 2.11 takes the truth value of every object
        that it calls, and a mask has none.
        """

    @abstractmethod
    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        """Return the keys that the queries ``lo..hi`` may see, and the keys that all of them surely see.

        ``lo`` and ``hi`` are int64 ``[rows]`` and inclusive. Each row is one run of query positions. The runs ascend, and none
        starts before the one before it ends.
        """

    # -- the tree ---------------------------------------------------------------------------------------------------

    def children(self) -> tuple[Mask, ...]:
        """Return the masks that this mask combines; a pattern has none."""
        return ()

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        """Return this node with other children."""
        assert not children
        return self

    def walk(self) -> Iterator[Mask]:
        """Yield this node and all nodes below it."""
        yield self
        for child in self.children():
            yield from child.walk()

    def captures(self) -> tuple[Captured, ...]:
        """Return the tensors that the mask reads, each once, in the order in which they are written."""
        captured: dict[Captured, None] = {}
        for node in self.walk():
            for field in fields(node):
                value = getattr(node, field.name)
                if isinstance(value, Captured):
                    captured[value] = None
        return tuple(captured)

    def bind(self, tensors: Mapping[Captured, Captured]) -> Mask:
        """Return the same mask with captured tensors replaced, for example a symbol by its tensor."""
        changes: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Captured) and value in tensors:
                changes[field.name] = tensors[value]
            elif isinstance(value, Mask):
                changes[field.name] = value.bind(tensors)
            elif isinstance(value, tuple) and value and isinstance(value[0], Mask):
                changes[field.name] = tuple(child.bind(tensors) for child in value)
        return replace(self, **changes) if changes else self

    def to(self, device: torch.device | str | None) -> Mask:
        """Return the same mask with its tensors on ``device``; None leaves them in place. Symbols stay as they are."""
        return self.bind({c: c.to(device) for c in self.captures() if not c.is_symbol}) if device is not None else self

    def sizes(self) -> tuple[int, int]:
        """Return the batch size and head count that the mask is written for. A count of 1 fits every attention.

        Raises ``ValueError`` if parts of the mask disagree on the batch size.
        """
        sizes = [child.sizes() for child in self.children()]
        return agree("batch", [b for b, _ in sizes]), max([h for _, h in sizes], default=1)

    def for_head(self, head: int, heads: int) -> Mask:
        """Return the mask of query head ``head`` of ``heads``, which contains no ``per_head``."""
        children = self.children()
        seen = [child.for_head(head, heads) for child in children]
        return self if all(a is b for a, b in zip(seen, children, strict=True)) else self.rebuild(seen)

    def head_groups(self, heads: int) -> dict[Mask, tuple[int, ...]]:
        """Return the distinct masks among ``heads`` query heads, each with its heads.

        In one block table, every head costs as much as the densest head. With one table per group, sparse groups stay small,
        and a dense causal group needs no table at all.
        """
        groups: dict[Mask, list[int]] = {}
        for head in range(heads):
            groups.setdefault(self.for_head(head, heads), []).append(head)
        return {mask: tuple(members) for mask, members in groups.items()}

    def for_heads(self, heads: int) -> Mask:
        """Return the same mask with every ``per_head`` expanded to ``heads`` query heads."""
        children = self.children()
        return self.rebuild([child.for_heads(heads) for child in children]) if children else self

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        """Raise ``ValueError`` unless the mask fits an attention of this shape."""
        for child in self.children():
            child.check(batch, heads, q_len, kv_len, q_offset)

    def implies(self, other: Mask) -> bool:
        """Return True only if ``other`` surely shows every pair that this mask shows.

        False means that this could not be proven; it may still hold.
        """
        return self == other or other.implied_by(self)

    def implied_by(self, other: Mask) -> bool:
        """Return whether the type of this node alone proves ``other.implies(self)``."""
        return False

    # -- the algebra ------------------------------------------------------------------------------------------------

    def __and__(self, other: Mask) -> Mask:
        return VIEWS.both(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return VIEWS.either(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return VIEWS.negated(self)

    def __bool__(self) -> bool:
        raise TypeError(
            "a mask has no truth value, so 'and', 'or' and 'not' cannot combine masks: write a & b, a | b, ~a instead"
        )

    def __repr__(self) -> str:
        return self.text(Captured.__repr__)

    def text(self, tensor: Callable[[Captured], str]) -> str:
        """Return the mask as code, with each captured tensor written by ``tensor``."""
        arguments = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, Captured):
                written = tensor(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], Mask):
                written = "[" + ", ".join(mask.text(tensor) for mask in value) + "]"
            elif isinstance(value, Mask):
                written = value.text(tensor)
            else:
                written = repr(value)
            arguments.append(written if field.default is MISSING else f"{field.name}={written}")
        return f"{self.name}({', '.join(arguments)})" if fields(self) else self.name

    # -- views of a mask; the work is done by the functions in ``VIEWS`` --------------------------------------------

    def dense(
        self,
        q_len: int,
        kv_len: int,
        *,
        q_offset: int = 0,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Evaluate every pair: bool ``[batch, heads, q_len, kv_len]``, True where visible. Tests use this as the reference.

        The first query is at position ``q_offset`` and the first key at position 0. Raises ``ValueError`` if the mask is
        written for another batch size or head count, or if it reads tensors that are shorter than these lengths.

            >>> sliding_window(2).dense(2, 3, q_offset=1)[0, 0].int().tolist()
            [[1, 1, 1], [0, 1, 1]]
        """
        check_sizes(q_offset=q_offset, q_len=q_len, kv_len=kv_len, batch=batch, heads=heads)
        self.check(batch, heads, q_len, kv_len, q_offset)
        mask = self.for_heads(heads).to(device)
        b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(heads, device=device).view(1, -1, 1, 1)
        i = torch.arange(q_offset, q_offset + q_len, device=device).view(1, 1, -1, 1)
        j = torch.arange(kv_len, device=device).view(1, 1, 1, -1)
        return torch.as_tensor(mask.__call__(b, h, i, j)).expand(batch, heads, q_len, kv_len).contiguous()

    def block_mask(
        self,
        q_len: int,
        kv_len: int,
        *,
        q_offset: int = 0,
        batch: int | None = None,
        heads: int | None = None,
        block_size: int | tuple[int, int] = 128,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Build the FlexAttention ``BlockMask`` of this mask in closed form, without visiting any pair.

        ``batch`` and ``heads`` default to what the mask is written for (see ``sizes``). Tables are int32 ``[batch, heads,
        query blocks, width]``. Their size decides how they are built:

        | table over all key blocks | ``width`` | accepted by | backward pass |
        |---|---|---|---|
        | up to 16 MiB | all key blocks | every kernel of torch | yes, from a dense grid of blocks |
        | larger | the longest row | the CUDA kernels, not the C++ kernel | no |

        For large tables, work and memory are O(query blocks x live blocks): one million queries and keys with ``causal &
        (sink(64) | sliding_window(1024))`` take milliseconds.

        One dense row makes the whole table as wide as the keys. With one dense head among 32, the table has
        32 x (N/128)^2 x 4 bytes, which is 8 GB for a million keys. ``head_groups`` splits such a mask, so that only dense
        groups have wide tables, and a dense causal group needs no table at all.

        Raises ``ValueError`` for sizes below 1 and for a mask that does not fit the shape.
        """
        return VIEWS.block_mask(self, q_len, kv_len, q_offset, batch, heads, block_size, device)

    def selected(
        self,
        q: Tensor,
        k: Tensor,
        *,
        q_offset: int = 0,
        page_size: int = 64,
        q_block: int = 1,
        valid: Tensor | None = None,
    ) -> Mask:
        """Return the mask of one attention: each ``page_topk`` is replaced by the keys that it selects for these queries.

        This is a slow reference implementation. ``q`` is ``[B, Hq, Q, D]`` with its first query at position ``q_offset``.
        ``k`` is ``[B, Hkv, KV, D]`` with its first key at position 0. ``valid`` is ``[B | 1, KV]`` and False for padding.

        Whole pages of ``page_size`` keys are selected, as in decode steps with a ``SparseCache`` of that page size. Each run
        of ``q_block`` queries shares one selection, which is made by their mean query. A prefill uses 128 for both sizes.
        A mask without selectors is returned unchanged. Raises ``ValueError`` if ``page_size`` is not a multiple of the
        selector's ``page``.

            >>> q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[1.0], [3.0], [2.0], [0.0]]]])
            >>> chosen = (causal & page_topk(2, page=1)).selected(q, k, q_offset=3, page_size=1)
            >>> chosen.dense(1, 4, q_offset=3).int().tolist()
            [[[[0, 1, 0, 1]]]]
        """
        return VIEWS.selected(self, q, k, q_offset=q_offset, page_size=page_size, q_block=q_block, valid=valid)

    def density(
        self, q_len: int, kv_len: int, *, q_offset: int = 0, batch: int | None = None, heads: int | None = None
    ) -> float:
        """Return the exact share of visible pairs among all pairs.

        >>> causal.density(4, 4)
        0.625
        """
        return VIEWS.density(self, q_len, kv_len, q_offset, batch, heads)

    def draw(self, q_len: int, kv_len: int, *, q_offset: int = 0, batch: int | None = None, heads: int | None = None) -> str:
        """Draw the mask as text, one line per query: ``█`` is visible, ``·`` is hidden.

        Several heads or batch rows are drawn one below the other, each under a title. Neighboring heads that look the same
        share a drawing.
        """
        return VIEWS.draw(self, q_len, kv_len, q_offset, batch, heads)

    def plot(self, q_len: int, kv_len: int, *, q_offset: int = 0, block_size: int = 128, head: int = 0) -> Figure:
        """Plot the pairs and the skipped, partial and full blocks of one head as a matplotlib figure.

        The figure shows the first batch row. Needs the extra ``plot``.
        """
        return VIEWS.plot(self, q_len, kv_len, q_offset, block_size, head)

    def to_json(self) -> str:
        """Return the mask as JSON text, which ``Mask.from_json`` reads back."""
        return VIEWS.to_json(self)

    @staticmethod
    def from_json(text: str) -> Mask:
        """Read a mask from the text that ``to_json`` wrote.

        Raises ``ValueError`` for broken text, another version, or an unknown pattern.
        """
        return VIEWS.from_json(text)


def agree(what: str, sizes: Sequence[int]) -> int:
    """Return the only size other than 1 among ``sizes``, or 1 if there is none. Raises ``ValueError`` if there are several."""
    distinct = {size for size in sizes if size != 1}
    if len(distinct) > 1:
        raise ValueError(f"the parts of a mask must agree on the {what} size, got {sorted(distinct)}")
    return distinct.pop() if distinct else 1


def check_sizes(*, q_offset: int = 0, **sizes: int) -> None:
    """Raise unless every size is an integer of at least 1. ``q_offset``, the position of the first query, may be 0."""
    for what, size, least in (("q_offset", q_offset, 0), *((what, size, 1) for what, size in sizes.items())):
        if isinstance(size, bool | float):
            raise TypeError(f"{what} needs an integer, got {size!r}")
        if size < least:
            raise ValueError(f"{what} needs to be at least {least}, got {size}")
