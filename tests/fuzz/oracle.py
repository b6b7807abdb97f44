"""The oracle of the fuzzer: every row alone, without padding and cache, in one dense pass with each pair decided by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fuzz import models
from fuzz.case import Case
from fuzz.chosen_pages import Asked, chosen_columns
from fuzz.formats import Stored, stored
from fuzz.language import Pair, Plan, Rule, Selector, read


@dataclass(frozen=True)
class Token:
    """A token of a row as it was fed.

    ``row`` is the row of the batch at that time, ``chunk`` the position of the first token of the same call, and ``stop`` that
    after the last one. ``since`` counts decode steps since the cache last changed otherwise.
    """

    id: int
    phase: str
    row: int
    chunk: int
    stop: int
    since: int = 0


@dataclass(frozen=True)
class Row:
    """A row of the batch: its padding on the left, and its tokens."""

    pad: int
    tokens: tuple[Token, ...] = ()


@dataclass
class Oracle:
    """The model of a case without the library. ``formats`` says how each KV head of a layer is quantized, if it is."""

    case: Case
    formats: Mapping[int, Mapping[int, Stored]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan: Plan = read(self.case.policy)
        self.model = models.build(self.case.model, "fuzz_oracle")
        self.is_tie = False  # whether a choice of pages was so close that rounding may decide it
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # queries and keys of each layer in this pass
        self._rules: dict[tuple[int, str], Rule] = {}
        self._read: dict[tuple[int, int, int, int], tuple[Tensor, Tensor]] = {}  # what was read back of quantized heads

    def logits(self, row: Row) -> Tensor:
        """The logits ``[tokens, vocabulary]`` of a row."""
        self._row = row
        self._kept.clear()
        self._read.clear()
        _current[:] = [self]
        ids = torch.tensor([[token.id for token in row.tokens]])
        result: Tensor = self.model(ids, use_cache=False).logits[0]
        return result

    def rule(self, layer: int, phase: str) -> Rule:
        """What a layer sees in a phase: what the model shows and the policy does not hide."""
        if (layer, phase) not in self._rules:
            mine = self.plan.rule(models.path(self.case.model, layer), layer, phase)
            own = models.own_rule(self.case.model, layer)
            self._rules[layer, phase] = own if mine is None else own & mine
        return self._rules[layer, phase]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention ``[heads, n, dim]`` of queries ``[heads, n, dim]`` over keys and values ``[KV heads, n, dim]``."""
        self._kept[layer] = q, k
        heads, group = q.shape[0], q.shape[0] // k.shape[0]
        out = torch.zeros_like(q, dtype=torch.float64)
        for i, token in enumerate(self._row.tokens):
            for kv_head in range(k.shape[0]):
                keys, values = self._stored(layer, kv_head, k[kv_head], v[kv_head], i)
                chosen = self._chosen(layer, kv_head, i, keys)
                for head in range(kv_head * group, (kv_head + 1) * group):
                    seen = [j for j in range(i + 1) if self._sees(layer, token, head, heads, i, j, chosen)]
                    if not seen:
                        continue  # zeros
                    query = self._placed(layer, kv_head, q[head, i].double(), i, seen)
                    scores = (query * keys[seen].double()).sum(dim=-1) * scale
                    out[head, i] = scores.softmax(dim=0) @ values[seen].double()
        return out.to(q.dtype)

    def _sees(self, layer: int, token: Token, head: int, heads: int, i: int, j: int, chosen: set[int] | None) -> bool:
        pair = Pair(token.row, head, heads, i, j, chosen is None or j in chosen)
        if self.case.cache.mode == "chunk_relaxed":  # a decode step is a chunk of one token
            if j >= token.chunk:
                return True
            pair = replace(pair, i=token.chunk - 1)
        return bool(self.rule(layer, token.phase).sees(pair))

    # -- page selection -------------------------------------------------------------------------------------------------

    def _chosen(self, layer: int, kv_head: int, i: int, keys: Tensor) -> set[int] | None:
        """The keys in the pages that the query heads of a KV head choose; None if nothing is chosen in this phase.

        A prefill of at most 128 columns is a single block, which chooses itself.
        """
        token, model = self._row.tokens[i], self.case.model
        if token.phase != "decode" or self.case.cache.kind not in ("sparse", "lent"):
            return None
        group = model.heads // self._kept[layer][1].shape[0]
        members = range(kv_head * group, (kv_head + 1) * group)
        selector = next((s for head in members if (s := self._selector(layer, head))), None)
        if selector is None:
            return None
        at = i - token.since % selector.every
        leader = layer if selector.share is None or selector.share == layer else selector.share
        q, raw = self._kept[leader]
        scored = self._stored(leader, kv_head, raw[kv_head], raw[kv_head], at)[0] if selector.score == "keys" else raw[kv_head]
        static, offered = (
            {
                j
                for j in range(i + 1)
                if any(self.rule(layer, "decode").sees(Pair(token.row, h, model.heads, i, j, shown)) for h in members)
            }
            for shown in (False, True)
        )
        asked = Asked(selector, q[list(members), at], scored, self._row.pad, self.case.cache.page_size, i, at)
        columns, is_tie = chosen_columns(asked, static, offered)
        self.is_tie |= is_tie
        return {column - self._row.pad for column in columns}

    def _selector(self, layer: int, head: int) -> Selector | None:
        return self.rule(layer, "decode").selector(head, self.case.model.heads)

    # -- what is stored, and where ----------------------------------------------------------------------------------------

    def _stored(self, layer: int, kv_head: int, k: Tensor, v: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The keys and values that query ``i`` reads. The tokens of a chunk read one another unquantized."""
        form = self.formats.get(layer, {}).get(kv_head)
        if form is None:
            return k, v
        token = self._row.tokens[i]
        stop = min(token.stop, len(self._row.tokens))  # later tokens may have been taken back
        fresh = token.chunk if token.phase == "prefill" else stop
        place = layer, kv_head, stop, fresh
        if place not in self._read:
            self._read[place] = stored(form, k, v, self._row.pad, stop, fresh)
        return self._read[place]

    def _placed(self, layer: int, kv_head: int, query: Tensor, i: int, seen: list[int]) -> Tensor:
        """The query for each key. Under ``cache_positions`` it is turned to its place in the cache where it meets the sink."""
        turned = query.expand(len(seen), -1)
        if not self.case.cache.cache_positions:
            return turned
        sinks, recents = zip(*(self._streams(layer, kv_head, phase) for phase in ("prefill", "decode")), strict=True)
        place = min(i, max(sinks) + max(recents) - 1)
        return torch.stack([_rotated(query, place - i) if j < max(sinks) else query for j in seen])

    def _streams(self, layer: int, kv_head: int, phase: str) -> tuple[int, int]:
        """The largest sink and window of a KV head, from what a query far behind sees."""
        model, far = self.case.model, 4000
        group = model.heads // model.kv_heads
        rule = self.rule(layer, phase)
        seen = {
            j
            for head in range(kv_head * group, (kv_head + 1) * group)
            for j in [*range(256), *range(far - 256, far + 1)]
            if rule.sees(Pair(0, head, model.heads, far, j, True))
        }
        return sum(j < 256 for j in seen), sum(j >= 256 for j in seen)


def _rotated(x: Tensor, by: int) -> Tensor:
    """Rotary positions of Llama: ``x`` ``[dim]``, moved by ``by`` positions."""
    half = x.shape[0] // 2
    out = x.clone()
    for pair in range(half):
        angle = by * models.THETA ** (-pair / half)
        a, b = float(x[pair]), float(x[pair + half])
        out[pair], out[pair + half] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return out


_current: list[Oracle] = []


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls for ``attn_implementation="fuzz_oracle"``."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _current[0].attend(layer, query[0], key[0], value[0], scale).transpose(0, 1)[None].contiguous(), None


AttentionInterface.register("fuzz_oracle", attend)
