"""The published rules of page selection, one function each: dense, slow, in float64, with loops over pages and channels.

Each function takes the queries ``[Hq, D]`` and keys ``[Hkv, N, D]`` of one decode step. It returns the pages that are read in
ascending order, for each query head, or for each KV head if the rule pools the query heads.
"""

from __future__ import annotations

from torch import Tensor

PageStorage = list[list[int]]


def pages_of(length: int, page: int) -> list[range]:
    """Return the keys of each page; the last page may be partial."""
    return [range(start, min(start + page, length)) for start in range(0, length, page)]


def upper_bound(query: Tensor, keys: Tensor) -> float:
    """Return the score of Quest, algorithm 1, for a page of keys ``[n, D]``: ``sum_d max(q_d * min_d, q_d * max_d)``."""
    total = 0.0
    for channel, q in enumerate(query.tolist()):
        values = [key[channel] for key in keys.tolist()]
        total += max(q * min(values), q * max(values))
    return total


def best(scores: dict[int, float], count: int) -> list[int]:
    """Return the pages with the highest scores; the lower page wins a tie."""
    return sorted(sorted(scores, key=lambda page: (-scores[page], page))[:count])


def bounds_of(query: Tensor, keys: Tensor, pages: list[range]) -> dict[int, float]:
    return {number: upper_bound(query.double(), keys.double()[list(page)]) for number, page in enumerate(pages)}


def quest_evaluation(q: Tensor, k: Tensor, budget: int, page: int = 16) -> PageStorage:
    """Select as the code of Quest's accuracy numbers (``evaluation/quest_attention.py``), for each query head.

    Keys are repeated over the query heads (GQA). At least three pages are read, and none is forced. The budget is at most the
    length of the text, so that short texts lose pages (Quest #22). Padding of the last page has the smallest possible value
    and never becomes a maximum.
    """
    pages = pages_of(k.shape[1], page)
    count = min(max(3, min(budget, k.shape[1]) // page), len(pages))
    group = q.shape[0] // k.shape[0]
    return [best(bounds_of(query, k[head // group], pages), count) for head, query in enumerate(q)]


def quest_kernel(q: Tensor, k: Tensor, budget: int, page: int = 16) -> PageStorage:
    """Select as the code of Quest's speed numbers (``quest/``), for each head of an MHA: the last page and the best others."""
    assert q.shape[0] == k.shape[0]
    pages = pages_of(k.shape[1], page)
    count = budget // page
    if len(pages) <= count:
        return [list(range(len(pages)))] * len(q)
    last = len(pages) - 1
    return [[*best(bounds_of(query, keys, pages[:last]), count - 1), last] for query, keys in zip(q, k, strict=True)]


def lserve(q: Tensor, k: Tensor, budget: int, physical: int = 64, logical: int = 16) -> PageStorage:
    """Select as LServe, for each query head: a physical page has the score of its best logical page.

    The last page and the best ``max(3, budget / 64) - 1`` of the other pages are read. If the text fits into the budget, all
    pages are read.
    """
    pages, length = pages_of(k.shape[1], physical), k.shape[1]
    if length <= budget:
        return [list(range(len(pages)))] * len(q)
    last, group = len(pages) - 1, q.shape[0] // k.shape[0]
    chosen = []
    for head, query in enumerate(q):
        logical_scores = bounds_of(query, k[head // group], pages_of(length, logical))
        per_page = physical // logical
        scores = {
            page: max(logical_scores[part] for part in range(page * per_page, (page + 1) * per_page)) for page in range(last)
        }
        chosen.append([*best(scores, max(3, budget // physical) - 1), last])
    return chosen


def kinetics(q: Tensor, k: Tensor, topk: int, *, sink: int = 0, local: int = 1, block: int = 16) -> PageStorage:
    """Return the keys that each KV head reads with the block top-k of Kinetics. Blocks are counted from the end of the sink.

    The score of a block is the mean of its logits over its keys and the query heads of the KV head. The sink, the last
    ``local`` keys, and the keys before these that fill no whole block are always read. If the text is no longer than the sink,
    the local keys and ``topk`` blocks (rounded up to whole blocks), all keys are read.
    """
    length, group = k.shape[1], q.shape[0] // k.shape[0]
    if length <= -(-(sink + local + topk * block) // block) * block:
        return [list(range(length))] * len(k)
    stop = sink + (length - local - sink) // block * block
    chosen = []
    for head, keys in enumerate(k.double()):
        queries = q.double()[head * group : (head + 1) * group]
        blocks = {number: range(start, start + block) for number, start in enumerate(range(sink, stop, block))}
        scores = {
            number: sum(float(query @ keys[j]) for query in queries for j in members) / (group * block)
            for number, members in blocks.items()
        }
        read = [j for number in best(scores, topk) for j in blocks[number]]
        chosen.append([*range(sink), *read, *range(stop, length)])
    return chosen
