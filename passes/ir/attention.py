"""One understood attention call: the value that every pass after the lift works on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch.fx import Node

from sparse_compile.masks import Mask, ScoreMod, causal, full, per_head
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.masks.selection.page_topk import has_selector
from sparse_compile.passes.ir.captured_source import Source
from sparse_compile.passes.ir.fx_nodes import expr_of, hint_of, is_one, layer_index, module_path, sizes_of, value_of
from sparse_compile.passes.ir.kv_source import Cached, Dense, KVSource, Prompt, Selected
from sparse_compile.passes.ir.positions import Positions

Phase = Literal["prefill", "decode", "other"]


@dataclass(frozen=True)
class Attention:
    """``softmax(score_mod(q @ k * scale) under mask & policy) @ v``, with keys and values from ``kv``.

    ``node`` computes the output ``[B, Hq, Q, Dv]`` in the model. ``mask`` and ``score_mod`` come from the model. ``policy``
    is the mask that a policy adds; it is ``full`` without a policy. ``sources`` maps each name in these masks and in the
    score mod to the tensor of the graph that it reads. ``mask_nodes`` are the nodes of the model's own mask. ``note`` says
    why a policy does not apply to this call; it is empty otherwise. ``caveat`` says for which queries or scores the result
    differs from the model's, if there can be any. ``unplaced`` says why the text positions of queries or keys are not known,
    so that no policy can apply; it is empty if they are.
    """

    node: Node
    q: Node
    kv: KVSource
    scale: float
    mask: Mask
    score_mod: ScoreMod | None
    positions: Positions
    phase: Phase
    is_self_attention: bool
    sources: Mapping[str, Source]
    mask_nodes: tuple[Node, ...]
    policy: Mask = full
    note: str = ""
    caveat: str = ""
    unplaced: str = ""

    # -- the mask ----------------------------------------------------------------------------------------------------

    @cached_property
    def visible(self) -> Mask:
        """The mask that applies: the model's mask and the policy."""
        return self.mask & self.policy

    @property
    def has_policy(self) -> bool:
        """Whether a policy restricts this call."""
        return self.policy != full

    @property
    def chooses_pages(self) -> bool:
        """Whether this is a decode step that reads selected pages of a cache."""
        return isinstance(self.kv, Selected) and self.kv.new.is_step

    @cached_property
    def selects(self) -> bool:
        """Whether the mask depends on the values of queries and keys, because it contains a selector (``page_topk``)."""
        return has_selector(self.visible)

    @cached_property
    def plain_form(self) -> str | None:
        """``causal`` or ``full`` if the mask is no more than that, so that SDPA needs no mask tensor; else None."""
        at = self.positions
        if self.score_mod is not None:
            return None
        if self.visible == full:
            return "full"
        if self.visible != causal or at.q_shift is not None:
            return None
        first, end = at.q_start - at.kv_start, at.q_start + expr_of(self.q_len) - at.kv_start - expr_of(self.kv_len)
        if end.expand() != 0:
            return None
        if expr_of(self.q_len) == 1:  # the last position sees every key
            return "full"
        return "causal" if first.expand() == 0 else None

    def of_heads(self, heads: Iterable[int]) -> Attention:
        """The same call with the masks of some query heads only; ``q`` and ``kv`` still hold all heads."""
        pairs = {head: (self.mask.for_head(head, self.heads), self.policy.for_head(head, self.heads)) for head in heads}
        if len(set(pairs.values())) == 1:
            mask, policy = next(iter(pairs.values()))
            return replace(self, mask=mask, policy=policy)
        return replace(self, mask=per_head([mask & policy for mask, policy in pairs.values()]), policy=full)

    # -- sizes: ints, or SymInts where they are dynamic -------------------------------------------------------------

    @property
    def batch(self) -> Any:
        """The number of sequences."""
        return sizes_of(self.q)[0]

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return hint_of(sizes_of(self.q)[1])

    @property
    def kv_heads(self) -> int:
        """The number of KV heads."""
        return self.kv.heads

    @property
    def group(self) -> int:
        """The number of query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def q_len(self) -> Any:
        """The number of queries."""
        return sizes_of(self.q)[2]

    @property
    def kv_len(self) -> Any:
        """The number of keys that queries can see."""
        return self.kv.length

    @property
    def dims(self) -> tuple[int, int, int]:
        """The number of channels of a query, a key and a value."""
        return (hint_of(sizes_of(self.q)[3]), *self.kv.dims)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the queries."""
        dtype: torch.dtype = value_of(self.q).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """The device the call runs on."""
        device: torch.device = value_of(self.q).device
        return device

    @property
    def is_step(self) -> bool:
        """Whether the call has exactly one query each time the graph runs, and is no verification."""
        return is_one(self.q_len) and not self.verifies

    @property
    def verifies(self) -> bool:
        """Whether the queries are the few tokens that speculative decoding verifies over a cache."""
        kv = self.kv
        return kv.verifies if isinstance(kv, Cached) else not isinstance(kv, Dense | Prompt) and kv.new.verifies

    # -- where it comes from ----------------------------------------------------------------------------------------

    @property
    def module(self) -> str:
        """The path of the module that makes the call."""
        return module_path(self.node)

    @property
    def layer(self) -> int | None:
        """The index of the layer that makes the call; None if the module path has no number."""
        return layer_index(self.module)

    @property
    def name(self) -> str:
        """The name of the call in messages: its module path, or the name of its node."""
        return self.module or self.node.name


def phase_of(q_len: Any, kv: KVSource, mask: Mask, *, is_self_attention: bool) -> Phase:
    """The phase of a call. Cross-attention is ``other``. One query over a cache or over several keys is ``decode``.

    All other calls over a cache are ``prefill``. So are calls without a cache under a causal mask, and under a mask that only a
    tensor describes, such as a mask of the caller or one behind a graph break. The rest attends in both directions and is
    ``other``.
    """
    if not is_self_attention:
        return "other"
    if isinstance(kv, Cached):
        return "decode" if is_one(q_len) and not kv.verifies else "prefill"
    if is_one(q_len) and expr_of(kv.length) != 1:
        return "decode"
    is_unknown = any(isinstance(node, Explicit) for node in mask.walk())
    return "prefill" if is_unknown or mask.implies(causal) else "other"
