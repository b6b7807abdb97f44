"""Let policies count the tokens of a text, and not its padding.

A ``SparseCache`` records the text position of every token. Without one, the text positions follow from the padding in the
model's mask: the first token after the padding has position 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from sparse_compile.masks import Captured, Mask, causal
from sparse_compile.masks.operators import conjuncts
from sparse_compile.masks.patterns.remapped import remapped
from sparse_compile.masks.patterns.tensor import Padding
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.captured_source import Source
from sparse_compile.passes.ir.fx_emit import inline
from sparse_compile.passes.ir.kv_source import Cached
from sparse_compile.passes.ir.rewrite import Rewrite

EVERYTHING = slice(None)


def count_tokens(rewrite: Rewrite) -> int:
    """Apply the policy of padded calls without a ``SparseCache`` at text positions. Returns the number of such calls.

    The windows of the model itself count columns, as transformers does.
    """
    made: list[tuple[Source, Node]] = []
    before = rewrite.calls
    rewrite.calls = [_counting(call, made) for call in before]
    return sum(call is not old for call, old in zip(rewrite.calls, before, strict=True))


def _counting(call: Attention, made: list[tuple[Source, Node]]) -> Attention:
    source = _padding(call)
    if source is None or not call.has_policy or call.policy == causal or call.mask.implies(call.policy):
        return call
    texts, sources = next((node for known, node in made if known == source), None), dict(call.sources)
    if texts is None:
        texts = inline(_behind(source.node), lambda tensor: _text_positions(source.read(tensor)), source.node)
        made.append((source, texts))
    sources[texts.name] = Source(texts, (EVERYTHING,) * 2, (0, 1), (EVERYTHING,) * 2)
    name = Captured.symbol(texts.name)
    return replace(call, policy=remapped(call.policy, name, name, ordered=True), sources=sources)


def _padding(call: Attention) -> Source | None:
    """Where the mask of a call reads which of its keys are padding; None without padding, and over a ``SparseCache``."""
    if isinstance(call.kv, Cached):
        return None
    parts: list[Mask] = [part for part in conjuncts(call.mask) if isinstance(part, Padding)]
    return next((call.sources.get(captured.name) for part in parts for captured in part.captures()), None)


def _behind(node: Node) -> Node:
    """The first node behind ``node`` that computes something. Inputs of a graph come first."""
    behind = node.next
    while behind.op == "placeholder":
        behind = behind.next
    return behind


def _text_positions(valid: Any) -> Tensor:
    """The text position of each column of ``valid`` ``[B, columns]``, -1 for padding before a token.

    Padding behind the last token has the positions that tokens would have there: no token sees it, and it may see tokens.
    """
    is_token = valid != 0
    counts = is_token | (is_token.flip(1).cumsum(1).flip(1) == 0)
    positions: Tensor = (counts.cumsum(1) * counts).int() - 1
    return positions
