"""Which pages a query chooses, by the rules that ``page_topk`` documents, one page and one key at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fuzz.language import Selector


@dataclass(frozen=True)
class Asked:
    """A choice: queries ``[group, dim]`` that score at position ``at``, keys ``[n, dim]``, and the query ``i`` that reads."""

    selector: Selector
    queries: Tensor
    keys: Tensor
    pad: int
    page_size: int
    i: int
    at: int


def chosen_columns(asked: Asked, static: set[int], offered: set[int]) -> tuple[set[int], bool]:
    """The columns of the chosen pages, and whether two scores were so close that rounding may decide.

    ``static`` and ``offered`` are positions of keys. A page is a run of columns, so padding counts.
    """
    size, newest = asked.page_size, (asked.pad + asked.i) // asked.page_size
    always = {(asked.pad + j) // size for j in static} | {newest}
    rest = {(asked.pad + j) // size for j in offered} - always
    unscored = (asked.pad + asked.at) // size  # this page and later ones rank first until pages are scored again
    scores = {page: _score(asked, page) if page < unscored else float("inf") for page in rest}
    order = sorted(rest, key=lambda page: (-scores[page], page))
    room = max(0, -(-asked.selector.tokens // size) - len(always))
    is_tie = 0 < room < len(order) and _close(scores[order[room - 1]], scores[order[room]])
    pages = always | set(order[:room])
    return {page * size + offset for page in pages for offset in range(size)}, is_tie


def _close(a: float, b: float) -> bool:
    return a != b and abs(a - b) <= 1e-3 * max(abs(a), abs(b), 1e-3)


def _score(asked: Asked, page: int) -> float:
    """The best logical page of a storage page."""
    starts = range(page * asked.page_size, (page + 1) * asked.page_size, asked.selector.page)
    return max(_logical(asked, range(start, start + asked.selector.page)) for start in starts)


def _logical(asked: Asked, columns: range) -> float:
    held = [column - asked.pad for column in columns if 0 <= column - asked.pad <= asked.at]
    if not held:
        return -torch.inf
    keys = asked.keys[held].double()
    each = []
    for query in asked.queries.double():
        match asked.selector.score:
            case "minmax":
                each.append(float(torch.maximum(query * keys.amin(dim=0), query * keys.amax(dim=0)).sum()))
            case "mean":
                each.append(float(query @ keys.mean(dim=0)))
            case _:
                each.append(float((keys @ query).max()))
    return {"max": max(each), "mean": sum(each) / len(each), "sum": sum(each)}[asked.selector.group]
