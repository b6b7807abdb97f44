"""A graph on its way through the passes: its attention calls, and what the passes did with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.fx import GraphModule, Node

from sparse_compile.masks import Mask
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.target import HeadGroup, Target
from sparse_compile.passes.ir.written_call import WrittenCall


@dataclass(frozen=True)
class CacheUse:
    """What one run of a graph does to a cache. The host state of that cache is updated from it.

    ``argument`` is the index of the graph input that counts the columns. ``batch`` and ``tokens`` are sizes of the new keys:
    each is a number, or the input and axis from which it can be read (axis None: the input is the number). ``layers`` are the
    layers that the graph updates, and ``last`` says that the cache's last layer is among them. ``empty`` says that the graph
    was traced for an empty cache.
    """

    argument: int
    batch: int | tuple[int, int | None]
    tokens: int | tuple[int, int | None]
    layers: tuple[int, ...]
    last: bool
    empty: bool


@dataclass(frozen=True)
class HeldBytes:
    """The bytes that a layer of a cache holds for each KV head, the bytes of a dense cache, and the tokens of both."""

    heads: tuple[int, ...] = ()
    dense: int | None = None
    tokens: int = 0


@dataclass(frozen=True)
class StorageGroup:
    """The attention of the query heads ``heads`` of a call, whose keys are all in one storage."""

    call: Attention
    heads: tuple[int, ...]


class Assign(Protocol):
    """Says which mask the policy has for a call: of all its entries, or of those for module paths only."""

    def __call__(self, call: Attention, *, by_path: bool) -> Mask | None: ...


@dataclass
class Rewrite:
    """A graph on its way through the passes.

    The read pass fills ``written``, and the lift fills ``calls``. Every pass moves calls that it cannot handle to ``left``. The
    cache pass splits calls into ``storage_groups``, and lowering records the ``head_groups`` that run; the node of the call is
    the key of both.
    """

    gm: GraphModule
    assign: Assign
    target: Target = field(default_factory=Target)
    dry: bool = False  # choose kernels for the report, and run the dense reference
    has_decoder: bool = False  # whether the model has a text decoder, which may be in another graph
    model_heads: tuple[int, int] | None = None  # the query heads and KV heads in the config of the model, if it is known
    written: list[WrittenCall] = field(default_factory=list)
    calls: list[Attention] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    storage_groups: dict[Node, tuple[StorageGroup, ...]] = field(default_factory=dict)
    head_groups: dict[Node, list[HeadGroup[Any]]] = field(default_factory=dict)
    held: dict[Node, HeldBytes] = field(default_factory=dict)
    replaced: list[Node] = field(default_factory=list)
    cache_uses: list[CacheUse] = field(default_factory=list)
    checks: list[Callable[[Sequence[Any]], None]] = field(default_factory=list)  # of the inputs of a run, before it starts
    closed: dict[Node, str] = field(default_factory=dict)  # ops whose bodies stay as they are, each with the reason

    @property
    def call_nodes(self) -> set[Node]:
        """The nodes of all calls that are not lowered yet, and of those that stay as they are."""
        return {call.node for call in self.calls} | {call.node for call in self.left}

    def keep(self, results: Sequence[Attention | Left]) -> None:
        """Replace ``calls`` by the results of a pass, and add those that stay as they are to ``left``."""
        self.calls = [result for result in results if isinstance(result, Attention)]
        self.left += [result for result in results if isinstance(result, Left)]


Pass = Callable[[Rewrite], int]
