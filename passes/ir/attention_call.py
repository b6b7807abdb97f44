"""One attention call of a graph, read into one value: what is attended, under which mask, for which module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
from torch.fx import Node

from sparse_compile.masks import Mask, ScoreMod, causal, full
from sparse_compile.passes.ir.fx_nodes import expr_of, hint_of, is_one, layer_index, module_path, shape_of, value_of
from sparse_compile.passes.ir.positions import Positions
from sparse_compile.passes.storage.codec import Codes, Format
from sparse_compile.passes.storage.layer_plan import Choice, Selecting

Phase = Literal["prefill", "decode", "other"]


@dataclass(frozen=True)
class Left:
    """An attention call that stays as it is, and why."""

    node: Node
    reason: str


class Refused(Exception):
    """A graph cannot run as asked. ``error`` is what its user should see when it runs: while compiling, torch would wrap it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Scored:
    """Pages that a decode step of a cache chooses from. ``new`` are the token's key and value, their buffers, the column, the
    column that steps are counted from and the text positions, if this layer leads; they are appended with the choice. Where
    there is ``padding``, the static part may touch any number of pages."""

    selecting: Selecting
    choice: Choice[Node]
    new: tuple[Node | None, ...] = ()
    padding: bool = False


@dataclass(frozen=True)
class Kept:
    """Keys and values of a piece as they are kept, in ``forms``; those of the call are what these stand for. ``appended`` is
    the op that encodes the new tokens."""

    keys: Codes[Node]
    values: Codes[Node]
    forms: tuple[Format, Format]
    appended: Node | None = None


@dataclass(frozen=True)
class RingRead:
    """A step over the ring of KV heads ``heads`` of its layer, which see the first ``sink`` tokens and the last ``recent``.

    ``texts`` ``[B, slots]`` are the text positions of the slots, ``text`` ``[B, 1]`` that of the query.
    """

    heads: tuple[int, ...]
    texts: Node
    text: Node
    sink: int
    recent: int


@dataclass(frozen=True)
class AttentionCall:
    """An attention call that was understood: ``softmax(score_mod(q @ k * scale) under mask) @ v``.

    ``node`` computes the output ``[B, Hq, Q, Dv]`` and is what a pass replaces. ``k`` and ``v`` are ``[B, Hkv, KV, D]``,
    un-repeated. ``attn_mask``, ``is_causal``, ``score_steps`` and ``sink`` are what the model wrote; the lift pass turns them
    into ``mask``, ``score_mod`` and ``positions``, with ``sources`` naming the tensors those read; the assign pass fills
    ``policy``. ``cache`` is the update of a ``SparseCache`` whose keys these are, ``cache_was_empty`` if the call looks at the
    new tokens alone; the kv pass cuts such a call into ``pieces``, and notes the bytes of each KV head and of a dense layer,
    and for how many tokens they are. ``scored`` are the pages of a piece that selects, ``kept`` its keys and values in fewer
    bits, ``ring`` what it sees of a ring; ``joined`` is the output of all pieces.
    """

    node: Node
    q: Node
    k: Node
    v: Node
    scale: float
    attn_mask: Node | None = None
    is_causal: bool = False
    score_steps: tuple[Any, ...] = ()
    sink: Node | None = None
    mask: Mask | None = None
    score_mod: ScoreMod | None = None
    positions: Positions | None = None
    is_self_attention: bool = True
    sources: dict[str, Any] = field(default_factory=dict)
    policy: Mask | None = None
    policy_reason: str = ""
    cache: Node | None = None
    cache_was_empty: bool = False
    cache_nbytes: tuple[tuple[int, ...], int, int] | None = None
    pieces: tuple[AttentionCall, ...] = ()
    scored: Scored | None = None
    kept: Kept | None = None
    ring: RingRead | None = None
    joined: Node | None = None

    @property
    def mask_nodes(self) -> tuple[Node, ...]:
        """The nodes of the mask and of everything else that is added to the scores."""
        steps = [step.node for step in self.score_steps if hasattr(step, "node")]
        return (*([self.attn_mask] if self.attn_mask is not None else []), *steps)

    @property
    def module(self) -> str:
        """The path of the module that makes the call."""
        return module_path(self.node)

    @property
    def layer(self) -> int | None:
        """The layer that makes the call."""
        return layer_index(self.module)

    @property
    def device(self) -> Any:
        """Where the call runs."""
        return value_of(self.q).device

    def size(self, which: Literal["q", "k", "v"], axis: int) -> Any:
        """A size of q, k or v: an int, or a SymInt where it is dynamic."""
        shape = shape_of(getattr(self, which))
        assert shape is not None
        return shape[axis]

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return hint_of(self.size("q", 1))

    @property
    def kv_heads(self) -> int:
        """The number of key heads."""
        return hint_of(self.size("k", 1))


def plain_form(call: AttentionCall, mask: Mask) -> str | None:
    """``causal`` or ``full`` where that is all ``mask`` says in this call, so that SDPA needs no mask tensor; else None."""
    at = call.positions
    assert at is not None
    if call.score_mod is not None:
        return None
    if mask == full:
        return "full"
    if mask != causal or at.q_shift is not None:
        return None
    q_len, kv_len = expr_of(call.size("q", 2)), expr_of(call.size("k", 2))
    first, end = at.q_start - at.kv_start, sympy.expand(at.q_start + q_len - at.kv_start - kv_len)
    if end != 0:
        return None
    if q_len == 1:  # the last position sees every key
        return "full"
    return "causal" if sympy.expand(first) == 0 else None


def is_decode_step(call: AttentionCall) -> bool:
    """Whether the call has one query in every run."""
    return is_one(call.size("q", 2))
