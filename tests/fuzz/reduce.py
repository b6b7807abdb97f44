"""Reduce a case that shows a fault to a smaller one that shows a fault of the same kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from fuzz.case import Cache, Case, Chunk, Generate, Prompt, Steps
from fuzz.play import Verdict, play

MOST_TRIES = 60


def reduced(case: Case, verdict: Verdict) -> Case:
    """A small case with the same fault, as far as ``MOST_TRIES`` plays find one."""
    tries = 0
    while True:
        for candidate in smaller(case):
            tries += 1
            if tries > MOST_TRIES:
                return case
            found = play(candidate)
            if found.kind == verdict.kind and (found.kind == "wrong" or found.detail[:60] == verdict.detail[:60]):
                case = candidate
                break
        else:
            return case


def smaller(case: Case) -> Iterator[Case]:
    """Simpler cases, the simplest first."""
    for at in reversed(range(1, len(case.calls))):
        yield replace(case, calls=case.calls[:at] + case.calls[at + 1 :])
    for change in ({"entry": "compile"}, {"dynamic": None}, {"spelled": False}):
        if any(getattr(case, name) != value for name, value in change.items()):
            yield replace(case, **change)
    for name in ("rollback", "mode", "cache_positions", "kv", "alone"):
        if getattr(case.cache, name) != getattr(Cache(), name):
            yield replace(case, cache=replace(case.cache, **{name: getattr(Cache(), name)}))
    if case.model.kind != "llama":
        yield replace(case, model=replace(case.model, kind="llama", window=None))
    for sizes in ((2, 1), (1, 1)):
        if (case.model.heads, case.model.kv_heads) != sizes and "per_head" not in case.policy:
            yield replace(case, model=replace(case.model, heads=sizes[0], kv_heads=sizes[1]))
    if case.model.layers > 1:
        yield replace(case, model=replace(case.model, layers=case.model.layers - 1))
    for policy in simpler(case.policy):
        yield replace(case, policy=policy)
    for at, call in enumerate(case.calls):
        shorter = _shorter(call)
        if shorter is not None:
            yield replace(case, calls=(*case.calls[:at], shorter, *case.calls[at + 1 :]))


def simpler(policy: str) -> Iterator[str]:
    """Simpler policies: a part instead of the whole."""
    for pattern, part in (
        (r"^Policy\((causal & \([^{}]*?\)\)), layers.*$", r"\1"),
        (r"^Policy\(prefill=(.*), decode=.*$", r"Policy(prefill=\1)"),
        (r"^per_head\(\[([^,\[]*), .*\]\)$", r"\1"),
        (r"\((\w+\([^()]*\)) [&|] [^()]*\([^()]*\)\)", r"\1"),
        (r"\([^()]*\([^()]*\) [&|] (\w+\([^()]*\))\)", r"\1"),
    ):
        changed = re.sub(pattern, part, policy, count=1)
        if changed != policy:
            yield changed


def _shorter(call: object) -> Prompt | Chunk | Steps | Generate | None:
    match call:
        case Prompt(length, pads) if len(pads) > 1:
            return Prompt(length, pads[:1] if any(pads[:1]) or not any(pads) else pads[1:])
        case Prompt(length, pads) if length > 12 and max(pads) < length // 2:
            return Prompt(length // 2, pads)
        case Chunk(length) if length > 3:
            return Chunk(length // 2 + 1)
        case Steps(count) if count > 1:
            return Steps(count // 2)
        case Generate(count, implementation) if count > 2:
            return Generate(count - 1, implementation)
    return None
