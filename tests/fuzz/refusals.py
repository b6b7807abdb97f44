"""Which refusals of the library are right: every message that a case may raise, with the fact that justifies it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from fuzz.case import Case, Chunk, Crop, Generate, Prompt, Reload, Steps, Trip
from fuzz.language import read

STREAMING = re.compile(r"causal & \(sink\(\d+\) \| sliding_window\(\d+\)\)")
OURS = ("ValueError", "TypeError", "SparseCacheError", "SparseCompileError", "ImportError")


@dataclass(frozen=True)
class Facts:
    """A case, the number of the call that raised, and how many columns the cache held before it."""

    case: Case
    call: int
    columns: int

    @property
    def asked(self) -> int:
        """The columns that the cache would hold after the call."""
        match self.case.calls[self.call] if self.call < len(self.case.calls) else None:
            case Prompt(length) | Chunk(length) | Trip(length):
                return self.columns + length
            case Steps(count) | Generate(count):
                return self.columns + count + 2  # ``generate`` continues with two tokens of the user
        return self.columns


def _has_wrong_list(facts: Facts) -> bool:
    model = facts.case.model
    kv_heads = model.heads if model.kind == "gpt2" else model.kv_heads
    return any(size not in (model.heads, kv_heads) for rule in read(facts.case.policy).parts() for size in rule.lists)


def _names_missing_layer(facts: Facts) -> bool:
    named = [key for key in read(facts.case.policy).named_layers() if not isinstance(key, str)]
    return max((key if isinstance(key, int) else max(key, default=0) for key in named), default=0) >= facts.case.model.layers


def _has_table(facts: Facts) -> bool:
    return any(word in facts.case.policy for word in ("prefix([", "document(", "padding("))


def _has_short_table(facts: Facts) -> bool:
    """Whether a table ends before the text, or before the end of a cache whose size is fixed."""
    cache = facts.case.cache
    reloaded = max((call.max_length for call in facts.case.calls if isinstance(call, Reload)), default=0)
    sizes = {"sparse": max(cache.max_length, reloaded), "static": cache.max_length, "lent": 128}
    needed = sizes.get(cache.kind, facts.asked)
    tables: list[str] = re.findall(r"(?:document|padding)\(\[(.*?)\]\)", facts.case.policy)
    rows = [row for table in tables for row in table.split(", ")]
    return any(sum(map(int, re.findall(r"\] \* (\d+)", row))) + row.count("[False]") < needed for row in rows)


def _may_keep_every_key(facts: Facts) -> bool:
    """Whether some call is under another mask than a sink and a window."""
    return bool(re.search(r"causal|page_topk|full", STREAMING.sub("", facts.case.policy))) or "=" in facts.case.policy


def _takes_back_more_than_promised(facts: Facts) -> bool:
    call = facts.case.calls[facts.call]
    return isinstance(call, Crop) and call.count > facts.case.cache.rollback


def _loads_less(facts: Facts) -> bool:
    call = facts.case.calls[facts.call]
    return isinstance(call, Reload) and call.max_length < facts.case.cache.max_length


def _has_tripped(facts: Facts) -> bool:
    return any(isinstance(call, Trip) for call in facts.case.calls[: facts.call + 1])


RIGHT: list[tuple[str, Callable[[Facts], bool]]] = [
    (r"per_head (of|has) \d+ masks", _has_wrong_list),
    (r"the policy names layer \d+, but the model has", _names_missing_layer),
    (r"has room for max_length=", lambda facts: facts.asked > facts.case.cache.max_length),
    (r"was built for batch size|was built for \d+ batch rows", _has_table),
    (r"covers \d+ positions, but", _has_short_table),
    (r"needs a SparseCache", lambda facts: facts.case.selects and facts.case.cache.kind not in ("sparse", "lent")),
    (r"identifies layers by number, but the policy names modules", lambda facts: '"' in facts.case.policy),
    (r"needs a policy under which every head drops keys", _may_keep_every_key),
    (r"cannot be removed", _takes_back_more_than_promised),
    (r"load it into a larger cache", _loads_less),
    (r"page_topk|selects? pages|logical page|page selector", lambda facts: facts.case.selects),
    (r"reset the cache", _has_tripped),
]


def is_right(message: str, facts: Facts) -> bool:
    """Whether a refusal with this message is justified for the case."""
    return any(re.search(pattern, message) and fact(facts) for pattern, fact in RIGHT)


def is_ours(error: Exception, file: str) -> bool:
    """Whether an error that was raised in ``file`` is one of the library's own."""
    return type(error).__name__ in OURS and re.search(r"/(sparse_compile|masks|passes)/[a-z_/]+\.py$", file) is not None
