"""The mask language as the fuzzer's oracle reads it: each mask is a predicate of row, head, query and key.

It shares no code with ``sparse_compile.masks``. Positions are those of the text, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

Lengths = int | Sequence[int]
Table = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Pair:
    """A query and a key: row of the batch, query head of how many, and positions; whether the key's page is selected."""

    row: int
    head: int
    heads: int
    i: int
    j: int
    selected: bool


class OutOfText(Exception):
    """A table of the mask has no entry for this row or position, so the library has to refuse the mask."""


@dataclass(frozen=True)
class Selector:
    """What ``page_topk`` was given."""

    tokens: int
    page: int = 16
    score: str = "minmax"
    group: str = "max"
    every: int = 1
    share: int | None = None


@dataclass(frozen=True)
class Rule:
    """A mask: ``sees`` says whether a pair is visible. ``selectors`` are the page selectors in it, by head."""

    sees: Callable[[Pair], bool]
    selector: Callable[[int, int], Selector | None] = lambda head, heads: None
    lists: tuple[int, ...] = ()  # the lengths of the lists for heads in it

    def __and__(self, other: Rule) -> Rule:
        return _joined(self, other, lambda p: self.sees(p) and other.sees(p))

    def __or__(self, other: Rule) -> Rule:
        return _joined(self, other, lambda p: self.sees(p) or other.sees(p))

    def __invert__(self) -> Rule:
        return Rule(lambda p: not self.sees(p), self.selector, self.lists)


def _joined(a: Rule, b: Rule, sees: Callable[[Pair], bool]) -> Rule:
    return Rule(sees, lambda head, heads: a.selector(head, heads) or b.selector(head, heads), a.lists + b.lists)


def _entry(table: Sequence[Any], at: int) -> Any:
    if at >= len(table):
        raise OutOfText
    return table[at]


def _row(table: Sequence[Any], row: int) -> Any:
    return table[0] if len(table) == 1 else _entry(table, row)


def _prefix(lengths: Lengths) -> Rule:
    return Rule(lambda p: p.j < (lengths if isinstance(lengths, int) else _row(lengths, p.row)))


def _document(ids: Table) -> Rule:
    return Rule(lambda p: bool(_entry(_row(ids, p.row), p.i) == _entry(_row(ids, p.row), p.j)))


def _padding(valid: Table) -> Rule:
    return Rule(lambda p: bool(_entry(_row(valid, p.row), p.j)))


def _per_head(rules: Sequence[Rule]) -> Rule:
    def of(head: int, heads: int) -> Rule:
        return rules[head * len(rules) // heads]

    lists = (len(rules), *(size for rule in rules for size in rule.lists))
    return Rule(lambda p: of(p.head, p.heads).sees(p), lambda head, heads: of(head, heads).selector(head, heads), lists)


def _page_topk(tokens: int, **options: Any) -> Rule:
    chosen = Selector(tokens, **options)
    return Rule(lambda p: p.selected, lambda head, heads: chosen)


@dataclass(frozen=True)
class Plan:
    """A policy: the rule of a layer in a phase. None leaves a call as it is."""

    default: Rule | None = None
    layers: Mapping[int | range | str, Rule] | None = None
    prefill: Rule | Plan | None = None
    decode: Rule | Plan | None = None

    def rule(self, path: str, layer: int, phase: str) -> Rule | None:
        """The rule of a call. An index precedes a range, a range a path."""
        for name, of_phase in (("prefill", self.prefill), ("decode", self.decode)):
            if phase == name and of_phase is not None:
                return plan_of(of_phase).rule(path, layer, phase)
        entries = list((self.layers or {}).items())
        found = [rule for key, rule in entries if isinstance(key, int) and key == layer]
        found += [rule for key, rule in entries if isinstance(key, range) and layer in key]
        found += [rule for key, rule in entries if isinstance(key, str) and fnmatchcase(path, key)]
        return found[0] if found else self.default

    def parts(self) -> list[Rule]:
        """All rules of the policy."""
        own = [self.default, *(self.layers or {}).values()]
        phases = [plan_of(phase) for phase in (self.prefill, self.decode) if phase is not None]
        return [rule for rule in own if rule is not None] + [rule for phase in phases for rule in phase.parts()]

    def named_layers(self) -> list[int | range | str]:
        """Everything by which the policy names layers."""
        phases = [plan_of(phase) for phase in (self.prefill, self.decode) if phase is not None]
        return [*(self.layers or {}), *(key for phase in phases for key in phase.named_layers())]


def plan_of(policy: Rule | Plan | None) -> Plan:
    """A rule alone is a policy for every call."""
    return policy if isinstance(policy, Plan) else Plan(policy)


CAUSAL = Rule(lambda p: p.j <= p.i)


def sink(n: int) -> Rule:
    """The first ``n`` keys."""
    return Rule(lambda p: p.j < n)


def window(n: int) -> Rule:
    """The keys after ``i - n``."""
    return Rule(lambda p: p.j > p.i - n)


def _streaming_llm(sink_size: int = 4, recent: int = 1020) -> Plan:
    return Plan(CAUSAL & (sink(sink_size) | window(recent)))


def _quest(budget: int, *, page: int = 16, dense_layers: int = 2) -> Plan:
    return Plan(prefill=CAUSAL, decode=Plan(CAUSAL & _page_topk(budget, page=page), {range(dense_layers): CAUSAL}))


NAMES: dict[str, Any] = {
    "causal": CAUSAL,
    "full": Rule(lambda p: True),
    "sink": sink,
    "sliding_window": window,
    "chunked": lambda n: Rule(lambda p: p.i // n == p.j // n),
    "strided": lambda step, offset=0: Rule(lambda p: (p.j - offset) % step == 0),
    "dilated": lambda n, step: Rule(lambda p: (p.i - p.j) % step == 0 and abs(p.i - p.j) < n * step),
    "prefix": _prefix,
    "document": _document,
    "padding": _padding,
    "per_head": _per_head,
    "page_topk": _page_topk,
    "Policy": Plan,
    "streaming_llm": lambda sink, recent: _streaming_llm(sink, recent),
    "quest": _quest,
}


def read(policy: str) -> Plan:
    """The policy of a case, as the oracle understands it."""
    return plan_of(eval(policy, dict(NAMES)))
