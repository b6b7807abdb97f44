"""What a mask is: a value that tells which (query, key) pairs may attend, and the algebra ``&``, ``|``, ``~``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sparse_compile.masks.captured import Captured
from sparse_compile.masks.intervals import Bounds

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.nn.attention.flex_attention import BlockMask

V = TypeVar("V", bound=Callable[..., Any])


class Views:
    """The functions behind those methods of ``Mask`` that need patterns, operators or viewers.

    Those files import ``Mask``, so they stand above this one. Each registers its functions when ``masks`` is imported.
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
    """Register the function behind the method of ``Mask`` that has its name."""
    setattr(VIEWS, function.__name__, function)
    return function


Index = Any  # an int, a scalar tensor under vmap, or a broadcasting index tensor: masks are written for all three


@dataclass(frozen=True, repr=False)
class Mask(ABC):
    """Which (query, key) pairs may attend: a function of batch, head, query position and key position.

    A mask is a FlexAttention ``mask_mod`` and a plain value: it prints as what you would type, compares, hashes,
    pickles and round-trips through JSON. Positions are text positions (0 is the first token).

        >>> from sparse_compile.masks import causal, sink, sliding_window
        >>> streaming = causal & (sink(1) | sliding_window(2))
        >>> streaming
        causal & (sink(1) | sliding_window(2))
        >>> print(streaming.draw(4, 4))
        █···
        ██··
        ███·
        █·██

    A new pattern answers two questions: ``__call__`` (is this pair visible?) and ``bounds`` (which keys may a run of
    queries see, and which do all of them surely see?). Everything else follows from these two.
    """

    name: ClassVar[str]
    tightness: ClassVar[int] = 4  # how strongly it binds when written; operators bind less
    selects: ClassVar[bool] = False  # whether it looks at queries and keys

    @abstractmethod
    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        """Is the pair visible? Integers, scalars under ``vmap`` and broadcasting index tensors all work.

        Masks that call masks spell it ``mask.__call__(...)``: Dynamo in torch 2.11 asks the truth of every object it calls.
        """

    @abstractmethod
    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        """The keys that the queries ``lo..hi`` may see, and those that all of them surely see.

        ``lo`` and ``hi`` (inclusive) are int64 ``[rows]``: runs of positions that ascend and do not overlap.
        """

    # -- the tree ---------------------------------------------------------------------------------------------------

    def children(self) -> tuple[Mask, ...]:
        """The masks this one is made of; none for a pattern."""
        return ()

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        """This node over other children."""
        assert not children
        return self

    def walk(self) -> Iterator[Mask]:
        """This node and all below it."""
        yield self
        for child in self.children():
            yield from child.walk()

    def captures(self) -> tuple[Captured, ...]:
        """The tensors the mask reads, each once, in the order they are written."""
        found: dict[Captured, None] = {}
        for node in self.walk():
            for field in fields(node):
                value = getattr(node, field.name)
                if isinstance(value, Captured):
                    found[value] = None
        return tuple(found)

    def bind(self, tensors: Mapping[Captured, Captured]) -> Mask:
        """The same mask with captured tensors exchanged, for example a name for the tensor it stands for."""
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
        """The same mask with the tensors it reads on ``device``."""
        return self.bind({c: c.to(device) for c in self.captures() if not c.is_symbol}) if device is not None else self

    def sizes(self) -> tuple[int, int]:
        """The batch and head counts the mask is written for; 1 where it does not care. Raises if parts disagree."""
        sizes = [child.sizes() for child in self.children()]
        return agree("batch", [b for b, _ in sizes]), max([h for _, h in sizes], default=1)

    def for_head(self, head: int, heads: int) -> Mask:
        """What query head ``head`` of ``heads`` sees, free of ``per_head``."""
        children = self.children()
        seen = [child.for_head(head, heads) for child in children]
        return self if all(a is b for a, b in zip(seen, children, strict=True)) else self.rebuild(seen)

    def head_groups(self, heads: int) -> dict[Mask, tuple[int, ...]]:
        """The distinct masks among ``heads`` query heads, each with its heads.

        Block tables cost per head what the densest head costs; built per group, sparse groups stay small and a dense
        causal group needs no table at all.
        """
        groups: dict[Mask, list[int]] = {}
        for head in range(heads):
            groups.setdefault(self.for_head(head, heads), []).append(head)
        return {mask: tuple(members) for mask, members in groups.items()}

    def for_heads(self, heads: int) -> Mask:
        """The same mask with every ``per_head`` spread over ``heads`` query heads."""
        children = self.children()
        return self.rebuild([child.for_heads(heads) for child in children]) if children else self

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        """Raise ``ValueError`` unless the mask fits an attention of this shape."""
        for child in self.children():
            child.check(batch, heads, q_len, kv_len, q_offset)

    def implies(self, other: Mask) -> bool:
        """Whether every pair this mask shows is surely shown by ``other``. May say no although it is so, never the reverse."""
        return self == other or other.implied_by(self)

    def implied_by(self, other: Mask) -> bool:
        """What the shape of this node alone says about ``other.implies(self)``."""
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

    def __str__(self) -> str:
        return self.text(Captured.__str__)

    def text(self, tensor: Callable[[Captured], str]) -> str:
        """The mask as it is written, with tensors written by ``tensor``."""
        arguments = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, Captured):
                written = tensor(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], Mask):
                written = "[" + ", ".join(mask.text(tensor) for mask in value) + "]"
            else:
                written = repr(value)
            arguments.append(written if field.default is MISSING else f"{field.name}={written}")
        return f"{self.name}({', '.join(arguments)})" if fields(self) else self.name

    # -- what can be asked of every mask; ``VIEWS`` does the work ---------------------------------------------------

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
        """Every pair, one by one: bool ``[batch, heads, q_len, kv_len]``, True where visible. The oracle of all tests.

        The first query stands at position ``q_offset``, the first key at 0. Raises ``ValueError`` if the mask is
        written for another batch or head count, or reads tensors shorter than these lengths.

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
        """The FlexAttention ``BlockMask`` of this mask, in closed form: no pair and no block grid is ever visited.

        Work and memory are O(query blocks x live blocks): a million by a million with ``causal & (sink(64) |
        sliding_window(1024))`` takes milliseconds. ``batch`` and ``heads`` default to what the mask is written for (1
        where it does not care). Tables are int32 ``[batch, heads, query blocks, width]``. ``width`` is all key blocks,
        as every kernel of torch accepts, while that table stays under 16 MiB; beyond, it is the longest row, which the
        CUDA kernels accept and the C++ one does not.

        A dense row is as wide as the keys: one dense head among 32 makes the table 32 x (N/128)^2 x 4 bytes (8 GB at a
        million). ``head_groups`` splits such a mask so that only dense groups pay, and those need no table at all.

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
        """The mask of one attention: every ``page_topk`` in place of the keys it chooses for these queries. Slow: an oracle.

        ``q`` is ``[B, Hq, Q, D]``, its first query at position ``q_offset``; ``k`` ``[B, Hkv, KV, D]``, its first key at 0;
        ``valid`` ``[B | 1, KV]`` is false for padding. Pages of ``page_size`` keys are kept, as a ``SparseCache`` of that page
        size does in decode steps; runs of ``q_block`` queries choose together by their mean (a prefill has both at 128).
        A mask without selectors stays as it is. Raises ``ValueError`` for pages that do not nest.

            >>> q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[1.0], [3.0], [2.0], [0.0]]]])
            >>> chosen = (causal & page_topk(2, page=1)).selected(q, k, q_offset=3, page_size=1)
            >>> chosen.dense(1, 4, q_offset=3).int().tolist()
            [[[[0, 1, 0, 1]]]]
        """
        return VIEWS.selected(self, q, k, q_offset=q_offset, page_size=page_size, q_block=q_block, valid=valid)

    def density(
        self, q_len: int, kv_len: int, *, q_offset: int = 0, batch: int | None = None, heads: int | None = None
    ) -> float:
        """Visible pairs over all pairs, exactly.

        >>> causal.density(4, 4)
        0.625
        """
        return VIEWS.density(self, q_len, kv_len, q_offset, batch, heads)

    def draw(self, q_len: int, kv_len: int, *, q_offset: int = 0, batch: int | None = None, heads: int | None = None) -> str:
        """The mask as text, one line per query: ``█`` visible, ``·`` not. Batches and heads follow one another."""
        return VIEWS.draw(self, q_len, kv_len, q_offset, batch, heads)

    def plot(self, q_len: int, kv_len: int, *, q_offset: int = 0, block_size: int = 128, head: int = 0) -> Figure:
        """A matplotlib figure: the pairs, and the blocks that are skipped, partial or full. Needs the extra ``plot``."""
        return VIEWS.plot(self, q_len, kv_len, q_offset, block_size, head)

    def to_json(self) -> str:
        """The mask as JSON text that ``Mask.from_json`` reads back."""
        return VIEWS.to_json(self)

    @staticmethod
    def from_json(text: str) -> Mask:
        """Read ``to_json`` back. Raises ``ValueError`` for broken text, another version, or an unknown pattern."""
        return VIEWS.from_json(text)


def agree(what: str, sizes: Sequence[int]) -> int:
    """The one size other than 1 among ``sizes``, or 1."""
    distinct = {size for size in sizes if size != 1}
    if len(distinct) > 1:
        raise ValueError(f"the parts of a mask must agree on the {what} size, got {sorted(distinct)}")
    return distinct.pop() if distinct else 1


def check_sizes(*, q_offset: int = 0, **sizes: int) -> None:
    """Raise unless every size is an integer of at least 1; ``q_offset``, the position of the first query, may be 0."""
    for what, size, least in (("q_offset", q_offset, 0), *((what, size, 1) for what, size in sizes.items())):
        if isinstance(size, bool | float):
            raise TypeError(f"{what} needs an integer, got {size!r}")
        if size < least:
            raise ValueError(f"{what} needs to be at least {least}, got {size}")
