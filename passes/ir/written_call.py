"""One attention call as the model wrote it, before its mask is understood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import sizes_of
from sparse_compile.passes.ir.score_steps import Step


@dataclass(frozen=True)
class Unseeing:
    """What the model computes for a query that sees no key, if ``finite`` numbers or -inf hide its keys."""

    finite: str = "the mean of all values"
    infinite: str = "zeros"


@dataclass(frozen=True)
class WrittenCall:
    """``node`` computes the output ``[B, Hq, Q, Dv]`` of attention with scores ``q @ k * scale``.

    ``k`` and ``v`` are ``[B, Hkv, KV, D]``, before each KV head is repeated for its query heads. ``attn_mask``, ``is_causal``,
    the steps between scores and softmax, and the learned ``sink`` are those of the model. ``is_self_attention`` says whether
    queries and keys come from one text. ``unseeing`` describes the output of a query without keys. ``in_parts``
    says that there was one more axis before batch and heads, so that queries and keys may be parts of a text.
    """

    node: Node
    q: Node
    k: Node
    v: Node
    scale: float
    attn_mask: Node | None = None
    is_causal: bool = False
    score_steps: tuple[Step, ...] = ()
    sink: Node | None = None
    is_self_attention: bool = True
    unseeing: Unseeing = Unseeing()
    in_parts: bool = False

    @property
    def mask_nodes(self) -> tuple[Node, ...]:
        """The nodes of the mask, and of every other tensor that changes the scores."""
        steps = [step.node for step in self.score_steps if hasattr(step, "node")]
        return (*([self.attn_mask] if self.attn_mask is not None else []), *steps)

    @property
    def q_len(self) -> Any:
        """The number of queries: an int, or a SymInt if it is dynamic."""
        return sizes_of(self.q)[2]

    @property
    def kv_len(self) -> Any:
        """The number of keys: an int, or a SymInt if it is dynamic."""
        return sizes_of(self.k)[2]
