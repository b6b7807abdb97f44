"""The oracle for page selection: a model that reads a text in chunks, keeps all keys, and selects pages in loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache

from sparse_compile.masks import Mask, causal, full, per_head
from sparse_compile.masks.selection.page_topk import PageTopK
from support.models import SMALL

Q_BLOCK = 128  # queries that share a selection in a prefill, and keys per selected block
SIZES = {**SMALL, "num_key_value_heads": 2, "initializer_range": 0.2}
LAYER_TYPES = ["sliding_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "llama mha": {**SIZES, "num_key_value_heads": 4},
    "llama of three layers": {**SIZES, "num_hidden_layers": 3},
    "qwen3": {**SIZES, "head_dim": 16},
    "mistral": {**SIZES, "sliding_window": 8},
    "gemma3_text": {**SIZES, "head_dim": 16, "sliding_window": 8, "layer_types": LAYER_TYPES},
}


def build(name: str, attention: str = "sdpa") -> Any:
    """Build a tiny model with the same weights every time, which are large enough that attention matters."""
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    return factory.from_config(AutoConfig.for_model(name.split(" ")[0], **MODELS[name]), attn_implementation=attention).eval()


# -- the rule -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PageSelection:
    """A KV head that sees ``base & (static | selector)``."""

    selector: PageTopK
    static: Mask = ~full
    base: Mask = causal

    @property
    def mask(self) -> Mask:
        return self.base & (self.static | self.selector)


Head = Mask | PageSelection


def mask_of(heads: Sequence[Head]) -> Mask:
    """Return the mask that a user would write for these KV heads."""
    masks = [head.mask if isinstance(head, PageSelection) else head for head in heads]
    return masks[0] if len(masks) == 1 else per_head(masks)


def together(rules: Sequence[Head]) -> PageSelection | None:
    """Join the query heads of a KV head. Keys that any of them may see are offered; keys that any always sees are static."""
    selection = [rule for rule in rules if isinstance(rule, PageSelection)]
    if not selection:
        return None
    static = [rule.base & rule.static if isinstance(rule, PageSelection) else rule for rule in rules]
    bases = [rule.base if isinstance(rule, PageSelection) else rule for rule in rules]
    return PageSelection(selection[0].selector, reduce(or_, static), reduce(or_, bases))


def score(selector: PageTopK, queries: Tensor, keys: Tensor, members: range, valid: Sequence[bool]) -> float:
    """Return the score of a page of keys ``[N, D]`` for queries ``[G, D]``; -inf without a valid key."""
    worth = -torch.inf
    for start in range(members.start, members.stop, selector.page):
        part = [j for j in range(start, min(start + selector.page, len(keys))) if valid[j]]
        if not part:
            continue
        held = keys.double()[part]
        each = []
        for query in queries.double():
            if selector.score == "minmax":
                each.append(float(torch.maximum(query * held.amin(dim=0), query * held.amax(dim=0)).sum()))
            elif selector.score == "mean":
                each.append(float(query @ held.mean(dim=0)))
            else:
                each.append(max(float(query @ key) for key in held))
        pooled = {"max": max(each), "mean": sum(each) / len(each), "sum": sum(each)}
        worth = max(worth, pooled[selector.group])
    return worth


def scores_of(selector: PageTopK, queries: Tensor, keys: Tensor, page_size: int, valid: Sequence[bool]) -> list[float]:
    """Return the score of every page."""
    starts = range(0, len(keys), page_size)
    return [score(selector, queries, keys, range(start, start + page_size), valid) for start in starts]


def kept_pages(scores: Sequence[float], static: set[int], offered: set[int], budget: int) -> set[int]:
    """Select the static pages, then the best offered pages until the budget is used up. The lower page wins a tie."""
    kept = set(static)
    for page in sorted(offered - static, key=lambda page: (-scores[page], page)):
        if len(kept) >= budget:
            break
        kept.add(page)
    return kept


def seen_by(mask: Mask, text: int, texts: Sequence[int], valid: Sequence[bool]) -> set[int]:
    """Return the key slots that the query at position ``text`` sees; ``texts`` are the positions of all slots."""
    row = mask.dense(1, max(*texts, text) + 1, q_offset=text)[0, 0, 0].tolist()
    return {j for j, at in enumerate(texts) if valid[j] and row[at]}


def keys_of(
    rule: PageSelection, scores: Sequence[float], columns: Sequence[int], texts: Sequence[int], valid: Sequence[bool], size: int
) -> list[set[int]]:
    """Return the key slots that each query in ``columns`` sees. The queries share one selection of pages of ``size`` keys."""
    shown = [seen_by(rule.base, texts[column], texts, valid) for column in columns]
    always = [seen_by(rule.base & rule.static, texts[column], texts, valid) for column in columns]
    static = {j // size for part in always for j in part} | {column // size for column in columns}
    offered = {j // size for part in shown for j in part}
    kept = kept_pages(scores, static, offered, -(-rule.selector.tokens // size))
    return [{j for j in part if j // size in kept} for part in shown]


# -- the model ----------------------------------------------------------------------------------------------------------


class Oracle:
    """Compute the logits of a text in chunks, with page selection. A chunk of one token is a decode step, others are prefill.

    ``layers`` holds the KV heads of each layer in decode steps, and ``prefill`` those in a prefill. Without ``prefill``, a
    prefill sees everything.
    """

    def __init__(
        self, layers: list[list[Head]], *, page_size: int, prefill: list[list[Head]] | None = None, name: str = "llama"
    ) -> None:
        self.layers, self.page_size = layers, page_size
        self.prefill: list[list[Head]] = prefill or [[causal] for _ in layers]
        self.model = build(name, "selection_oracle")
        self.reset()

    def reset(self) -> None:
        """Start over with an empty cache."""
        self.cache, self.padding = DynamicCache(), torch.zeros(1, 0, dtype=torch.int64)
        self.forget_scores()

    def forget_scores(self) -> None:
        """Drop the scores after the cached keys have changed, so that the next decode step scores."""
        self.scores: dict[tuple[int, int, int], tuple[list[float], int]] = {}  # layer, row, head: scores, slots then
        self.steps: dict[tuple[int, int], int] = {}  # layer, head: decode steps since then

    def crop(self, remove: int) -> None:
        self.cache.crop(-remove)
        self.padding = self.padding[:, :-remove]
        self.forget_scores()

    def reorder(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]  # any integers will do
        self.padding = self.padding[rows]
        self.forget_scores()

    def feed(self, ids: Tensor, lengths: Sequence[int] | None = None, padding: Tensor | None = None) -> Tensor:
        """Append ``ids`` in chunks and return their logits. Zeros in ``padding``, one entry per token, mark padding."""
        new = torch.ones_like(ids) if padding is None else padding
        logits, done = [], 0
        current[:] = [self]
        for length in lengths or [ids.shape[1]]:
            chunk = slice(done, done + length)
            cached = self.padding if self.padding.shape[1] else new[:, :0]
            self.padding = torch.cat([cached, new[:, chunk]], dim=1)
            positions = (self.padding.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
            if length > 1:
                self.forget_scores()
            with torch.no_grad():
                logits.append(self.model(ids[:, chunk], past_key_values=self.cache, position_ids=positions).logits)
            done += length
        return torch.cat(logits, dim=1)

    def visible(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
        """Return what the last queries ``[B, Hq, Q, D]`` of the text see: bool ``[B, Hq, Q, KV]``."""
        (batch, heads, q_len, _), (_, kv_heads, kv_len, _) = query.shape, key.shape
        group, seen = heads // kv_heads, torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
        kv_rules = (self.prefill if q_len > 1 else self.layers)[layer]
        rules = [kv_rules[head * len(kv_rules) // heads] for head in range(heads)]
        wholes = [together(rules[first : first + group]) for first in range(0, heads, group)]
        if q_len == 1:
            self._score(layer, wholes, query, key)
        for row in range(batch):
            valid = self.padding[row].bool().tolist()
            texts = (self.padding[row].cumsum(dim=0) - 1).clamp(min=0).tolist()
            for head, rule in enumerate(rules):
                kv_head = head // group
                queries, whole = query[row, kv_head * group : (kv_head + 1) * group], wholes[kv_head]
                for first in range(0, q_len, Q_BLOCK):
                    block = range(first, min(first + Q_BLOCK, q_len))
                    columns = [kv_len - q_len + i for i in block]
                    own = rule.base if isinstance(rule, PageSelection) else rule
                    sets = [seen_by(own, texts[column], texts, valid) for column in columns]
                    if isinstance(rule, PageSelection) and whole is not None:
                        if q_len == 1:
                            size, scores = self.page_size, self._stored(layer, row, kv_head, kv_len, whole)
                        else:
                            mean = queries[:, block].double().mean(dim=1)
                            size, scores = Q_BLOCK, scores_of(whole.selector, mean, key[row, kv_head], Q_BLOCK, valid)
                        kept = keys_of(whole, scores, columns, texts, valid, size)
                        sets = [part & pages for part, pages in zip(sets, kept, strict=True)]
                    for i, column, part in zip(block, columns, sets, strict=True):
                        seen[row, head, i, list(part) if valid[column] else [column]] = True
        return seen

    def _score(self, layer: int, wholes: Sequence[PageSelection | None], query: Tensor, key: Tensor) -> None:
        """Score pages for the selectors that score in this decode step."""
        group = query.shape[1] // key.shape[1]
        for head, rule in enumerate(wholes):
            if rule is None or rule.selector.leader(layer) != layer:
                continue
            step = self.steps[layer, head] = self.steps.get((layer, head), -1) + 1
            if step % rule.selector.every == 0:
                for row, queries in enumerate(query[:, head * group : (head + 1) * group, 0]):
                    valid = self.padding[row].bool().tolist()
                    scores = scores_of(rule.selector, queries, key[row, head], self.page_size, valid)
                    self.scores[layer, row, head] = scores, key.shape[2]

    def _stored(self, layer: int, row: int, head: int, columns: int, rule: PageSelection) -> list[float]:
        """Return the scores that a layer uses. The page that was newest at the last scoring, and all later pages, have inf."""
        scores, then = self.scores[rule.selector.leader(layer), row, head]
        pages = -(-columns // self.page_size)
        scored = (then - 1) // self.page_size
        return [*scores[:scored], *[torch.inf] * (pages - scored)]


current: list[Oracle] = []


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention; transformers models call this with ``attn_implementation="selection_oracle"``."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    seen = current[0].visible(layer, query, key)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return (scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("selection_oracle", attend)
