"""One attention call of a graph, read into one value: what is attended, under which mask, for which module."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.fx import Node

from sparse_compile.masks import Mask, ScoreMod
from sparse_compile.passes.formats import Codes, Format
from sparse_compile.passes.graph import Order, argument, expr_of, hint_of, layer_index, module_path, op_name, shape_of, value_of
from sparse_compile.passes.positions import Positions
from sparse_compile.passes.storage import Choice, Selecting

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


def read_sdpa(node: Node, order: Order) -> AttentionCall | Left:
    """Read ``scaled_dot_product_attention`` in any of its argument forms."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    defaults = (None, None, None, None, 0.0, False, None, False)
    q, k, v, attn_mask, dropout, causal, scale, gqa = (
        argument(node, at, name, default) for at, (name, default) in enumerate(zip(names, defaults, strict=True))
    )
    if not isinstance(dropout, int | float):
        return Left(node, "dropout_p is decided at run time")
    if dropout > 0:
        return Left(node, f"dropout_p={dropout}: FlexAttention has no dropout")
    if not isinstance(causal, bool) or not isinstance(gqa, bool):
        return Left(node, "is_causal or enable_gqa is decided at run time")
    if not (scale is None or isinstance(scale, int | float)):
        return Left(node, "scale is decided at run time")
    return build_call(node, q, k, v, scale=scale, attn_mask=attn_mask, is_causal=causal, order=order)


def build_call(
    node: Node, q: Node, k: Node, v: Node, *, scale: float | None, order: Order, **read: Any
) -> AttentionCall | Left:
    """An ``AttentionCall`` over un-repeated keys and values, or the reason why the shapes do not allow one."""
    for name, operand in (("query", q), ("key", k), ("value", v)):
        value = value_of(operand)
        if not isinstance(value, Tensor):
            return Left(node, f"the {name} has no recorded shape")
        if value.dim() != 4:
            return Left(node, f"the {name} has {value.dim()} axes, not [batch, heads, length, head_dim]")
        if not value.dtype.is_floating_point:
            return Left(node, f"the {name} has dtype {value.dtype}")
    k, v = peel_repeats(k, v, node, order)
    shapes = [shape_of(x) for x in (q, k, v)]
    (batch, heads, _, dim), (k_batch, k_heads, k_len, _), (v_batch, v_heads, v_len, _) = (s or () for s in shapes)
    # Sizes are compared by the traced example: symbols of equal sizes may differ, and attention itself demands equality.
    if not hint_of(batch) == hint_of(k_batch) == hint_of(v_batch):
        return Left(node, f"query, key and value have batch sizes {batch}, {k_batch} and {v_batch}")
    if not (isinstance(heads, int) and isinstance(k_heads, int) and k_heads == v_heads and heads % k_heads == 0):
        return Left(node, f"{heads} query heads over {k_heads} key heads and {v_heads} value heads")
    if hint_of(k_len) != hint_of(v_len):
        return Left(node, f"{k_len} keys and {v_len} values")
    scale = float(scale) if scale is not None else 1 / math.sqrt(hint_of(dim))
    return AttentionCall(node, q, k, v, scale, **read)


def peel_repeats(k: Node, v: Node, call: Node, order: Order) -> tuple[Node, Node]:
    """The keys and values before each head was repeated for its query group, if both were, and equally often."""
    bare_k, bare_v = unrepeated(k, call, order), unrepeated(v, call, order)
    if bare_k is None or bare_v is None or (shape_of(bare_k) or ())[1] != (shape_of(bare_v) or ())[1]:
        return k, v
    return bare_k, bare_v


def unrepeated(node: Node, call: Node, order: Order) -> Node | None:
    """``x`` where ``node`` is ``repeat_kv(x)``: ``repeat_interleave`` over heads, or expand and reshape; None if it is not.

    ``x`` must not be written to between its repetition and the call.
    """
    while op_name(node) in ("contiguous", "clone") and isinstance(node.args[0], Node):
        node = node.args[0]
    source = None
    if op_name(node) == "repeat_interleave":
        repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
        source = node.args[0] if isinstance(repeats, int) and dim in (1, -3) else None
    elif op_name(node) in ("reshape", "view", "flatten"):
        source = _expanded_groups(node)
    if not isinstance(source, Node) or len(shape_of(source) or ()) != 4:
        return None
    return None if order.written(source, since=node, until=call) else source


def _expanded_groups(node: Node) -> Node | None:
    """``x`` of ``x[:, :, None].expand(B, Hkv, n, S, D).reshape(B, Hkv * n, S, D)``."""
    wide = node.args[0]
    if not isinstance(wide, Node) or op_name(wide) not in ("expand", "broadcast_to"):
        return None
    narrow = wide.args[0]
    if not isinstance(narrow, Node) or op_name(narrow) not in ("getitem", "unsqueeze", "view", "reshape"):
        return None
    source = narrow.args[0]
    if not isinstance(source, Node):
        return None
    shapes = [shape_of(n) for n in (source, narrow, wide, node)]
    if any(s is None for s in shapes) or [len(s or ()) for s in shapes] != [4, 5, 5, 4]:
        return None
    b, h, s, d = shapes[0] or ()
    repeats = (shapes[2] or ())[2]
    expected = ([b, h, 1, s, d], [b, h, repeats, s, d], [b, h * repeats, s, d])
    for shape, wanted in zip(shapes[1:], expected, strict=True):
        if [expr_of(x) for x in shape or ()] != [expr_of(x) for x in wanted]:
            return None
    return source
