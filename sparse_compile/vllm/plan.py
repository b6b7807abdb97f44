"""Plan which KV heads of each layer become one attention layer of vLLM, from the policy and the sizes of the model."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparse_compile.masks import causal, sliding_window
from sparse_compile.policy import Policy
from sparse_compile.vllm.balance import balanced_order
from sparse_compile.vllm.kinds import Kind, kind_of

MOST_MASKS = 4  # vLLM compiles its kernel three or four times for each mask, and gives up after 16 times
MOST_GROUPS = 16  # every KV cache group has block tables and metadata of its own, which the host prepares for each step


@dataclass(frozen=True)
class Shape:
    """The sizes of a whole model: all ranks together. ``windows`` has the model's own sliding window of each layer, or None."""

    heads: int
    kv_heads: int
    windows: tuple[int | None, ...]


@dataclass(frozen=True)
class Part:
    """KV heads of one layer and one rank that vLLM serves as one attention layer. ``kv_heads`` counts from 0 on each rank."""

    name: str
    kind: Kind
    kv_heads: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The kinds of all KV heads, ``[layers][KV heads]``, in their places, and how many heads every part has.

    ``orders`` says which head of the model takes each place, if heads change places to balance ranks.

    All parts have equally many heads. Their blocks are then equally large, so that vLLM neither pads nor rescales any of them,
    and layers may have different numbers of heads of a kind.
    """

    kinds: tuple[tuple[Kind, ...], ...]
    ranks: int
    unit: int
    orders: tuple[tuple[int, ...], ...] | None = None

    def parts(self, layer: int, rank: int) -> tuple[Part, ...]:
        """The parts of one layer on one rank. Every rank gives its parts the same names."""
        heads: dict[Kind, list[int]] = {}
        for head, kind in enumerate(of_rank(self.kinds[layer], rank, self.ranks)):
            heads.setdefault(kind, []).append(head)
        parts = []
        for kind, members in sorted(heads.items(), key=lambda item: _text(item[0])):
            label = hashlib.sha256(_text(kind).encode()).hexdigest()[:8]
            for number, first in enumerate(range(0, len(members), self.unit)):
                parts.append(Part(f"{kind.name}_{label}_{number}", kind, tuple(members[first : first + self.unit])))
        return tuple(parts)

    def groups(self) -> int:
        """The number of KV cache groups that vLLM will make of the parts and of their page summaries."""
        kinds = [part.kind for layer in range(len(self.kinds)) for part in self.parts(layer, 0)]
        stored = Counter(kind.past for kind in kinds)
        if stored.keys() == {None}:
            return 1  # vLLM serves layers that store every key in one group, also where blocks differ in size
        summaries = sum(kind.selector is not None for kind in kinds)
        return count_groups([*stored.values(), *([summaries] if summaries else [])])


def plan_model(
    policy: Policy,
    shape: Shape,
    *,
    max_length: int,
    block_size: int,
    ranks: int = 1,
    one_head: bool = False,
    balance: bool = False,
) -> Plan:
    """Plan the parts of a model of this shape whose KV heads are dealt to ``ranks`` in order.

    Texts have up to ``max_length`` tokens, in blocks of ``block_size``. ``one_head`` asks for parts of one KV head if there is
    more than one kind of head, as platforms need whose kernels and FlexAttention order the heads in a block differently. With
    ``balance``, heads change places so that all ranks have equally many of each kind.

    Raises ``ValueError`` for a policy that does not fit the model or that vLLM cannot serve, for ranks with different kinds of
    heads, and for too many KV cache groups.
    """
    policy.check(len(shape.windows), shape.heads, shape.kv_heads)
    if policy.names_modules():
        raise ValueError("vLLM names modules in its own way, but the policy names modules: use layer indices or ranges")
    lengths = {"max_length": max_length, "block_size": block_size}
    kinds = tuple(tuple(_kinds_of_layer(policy, layer, shape, lengths)) for layer in range(len(shape.windows)))
    orders = None
    if balance and ranks > 1:
        orders = tuple(
            tuple(range(len(heads))) if _are_even(heads, ranks) else balanced_order(layer, heads, ranks)
            for layer, heads in enumerate(kinds)
        )
        kinds = tuple(tuple(heads[head] for head in order) for heads, order in zip(kinds, orders, strict=True))
    _check_ranks(kinds, ranks)
    counts = {count for layer in kinds for count in Counter(of_rank(layer, 0, ranks)).values()}
    distinct = {kind for layer in kinds for kind in layer}
    masked = {kind.masks for kind in distinct if not kind.stock and kind.selector is None}
    if len(masked) > MOST_MASKS:
        raise ValueError(
            f"the policy has {len(masked)} different masks that are no plain windows, and vLLM serves at most {MOST_MASKS}: "
            "use fewer, such as one sink and window for all streaming heads"
        )
    plan = Plan(kinds, ranks, 1 if one_head and len(distinct) > 1 else math.gcd(*counts), orders)
    if plan.groups() > MOST_GROUPS:
        raise ValueError(
            f"the policy makes {plan.groups()} KV cache groups of vLLM, and at most {MOST_GROUPS} are served: give the kinds "
            "of heads more equal numbers in the whole model, as half of the heads full and half of them streaming"
        )
    return plan


def of_rank(heads: Sequence[Kind], rank: int, ranks: int) -> Sequence[Kind]:
    """The KV heads of one layer that a rank has. If there are more ranks than heads, several ranks have the same head."""
    own = max(1, len(heads) // ranks)
    first = rank * len(heads) // ranks
    return heads[first : first + own]


def count_groups(layers: Iterable[int]) -> int:
    """The number of groups that vLLM makes of equally large layers, given how many are stored in each way.

    It takes the smallest number as the size of a group, or the largest if they are close, and splits the others.

        >>> count_groups([16, 16]), count_groups([2, 30]), count_groups([12, 13])
        (2, 16, 2)
    """
    counts = list(layers)
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return sum(-(-count // size) for count in counts)


def _kinds_of_layer(policy: Policy, layer: int, shape: Shape, lengths: dict[str, int]) -> Iterable[Kind]:
    group, window = shape.heads // shape.kv_heads, shape.windows[layer]
    model = causal if window is None else causal & sliding_window(window)
    masks = tuple(policy.mask_for("", layer, phase) for phase in ("prefill", "decode"))
    for first in range(0, shape.heads, group):
        prefill, decode = (
            [model if mask is None else model & mask.for_head(head, shape.heads) for head in range(first, first + group)]
            for mask in masks
        )
        yield kind_of(layer, model, prefill, decode, **lengths)


def _check_ranks(kinds: tuple[tuple[Kind, ...], ...], ranks: int) -> None:
    for layer, heads in enumerate(kinds):
        if not _are_even(heads, ranks):
            counts = [Counter(kind.name for kind in of_rank(heads, rank, ranks)) for rank in range(ranks)]
            written = "; ".join(
                f"rank {rank}: {', '.join(f'{n} {name}' for name, n in sorted(c.items()))}" for rank, c in enumerate(counts)
            )
            raise ValueError(
                f"tensor parallelism needs equally many heads of a kind on every rank, but layer {layer} has {written}: set "
                '"balance": true beside the policy, or use --tensor-parallel-size 1'
            )


def _are_even(heads: Sequence[Kind], ranks: int) -> bool:
    """Whether all ranks have equally many heads of every kind."""
    counts = [Counter(of_rank(heads, rank, ranks)) for rank in range(ranks)]
    return all(count == counts[0] for count in counts)


def _text(kind: Kind) -> str:
    return " ".join(map(str, kind.masks))
