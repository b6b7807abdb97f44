"""The rules of page selection in plain PyTorch: how pages are summarized, how queries score them, and which are selected.

A *physical* page is what the cache stores and attention visits (64 keys). A *logical* page is what one page summary covers
(16 keys). A physical page has the score of its best logical page (LServe, https://arxiv.org/abs/2502.14866).
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN, OFFERED, KEPT = 0, 1, 2  # page classes: no key is visible, the budget decides, always selected


def summary_width(score: str, dim: int) -> int:
    """Return how many numbers a page summary has; 0 if the keys themselves are scored."""
    return {"minmax": 2 * dim, "mean": dim, "keys": 0}[score]


def summarize(keys: Tensor, valid: Tensor | None, page: int, score: str) -> Tensor:
    """Summarize every page of the keys ``[B, H, N, D]``: page summaries ``[B, H, N / page, width]`` in the keys' dtype.

    Only keys that are ``valid`` (``[B | 1, N]``; None means all) count. A ``minmax`` summary holds the minimum and then the
    maximum of each channel (Quest, https://arxiv.org/abs/2406.10774). A ``mean`` summary holds the mean of each channel. A
    page without a valid key has a summary of zeros and should not be scored (see ``alive``).
    """
    pages: Tensor = keys.unflatten(2, (-1, page))
    if valid is None:
        if score == "mean":
            return pages.mean(dim=3, dtype=torch.float32).to(keys.dtype)
        return torch.cat([pages.amin(dim=3), pages.amax(dim=3)], dim=-1)
    seen: Tensor = valid.unflatten(1, (-1, page))[:, None, :, :, None]
    some = seen.any(dim=3)
    if score == "mean":
        total = torch.where(seen, pages, 0).sum(dim=3, dtype=torch.float32)
        mean: Tensor = (total / seen.sum(dim=3).clamp(min=1)).to(keys.dtype)
        return mean
    low = torch.where(seen, pages, torch.inf).amin(dim=3)
    high = torch.where(seen, pages, -torch.inf).amax(dim=3)
    return torch.cat([torch.where(some, low, 0), torch.where(some, high, 0)], dim=-1)


def score_summaries(q: Tensor, summary: Tensor, score: str) -> Tensor:
    """Score page summaries ``[B, H, L, width]`` for queries ``[B, H, G, D]``: fp32 ``[B, H, G, L]``.

    The ``minmax`` score is ``sum_d max(q_d * min_d, q_d * max_d)``. No key of the page has a larger product with the query.
    One matrix product computes it: negative parts of q multiply the minima, and positive parts multiply the maxima. The
    textbook form ``q @ min + relu(q) @ (max - min)`` has an additional rounding error, in ``max - min``.
    """
    q = q.float()
    if score == "minmax":
        q = torch.cat([q.clamp(max=0), q.clamp(min=0)], dim=-1)
    return q @ summary.float().transpose(-1, -2)


def score_keys(q: Tensor, keys: Tensor, valid: Tensor | None, page: int) -> Tensor:
    """Return the largest product of queries ``[B, H, G, D]`` and valid keys ``[B, H, N, D]`` in each logical page.

    The result is fp32 ``[B, H, G, N / page]``. Pages without a valid key have -inf.
    """
    products = q.float() @ keys.float().transpose(-1, -2)
    if valid is not None:
        products = products.masked_fill(~valid[:, None, None, :], -torch.inf)
    best: Tensor = products.unflatten(-1, (-1, page)).amax(dim=-1)
    return best


def pool(scores: Tensor, group: str, per_page: int, alive: Tensor | None = None) -> Tensor:
    """Pool scores ``[..., G, L]`` over the query heads of a KV head, then take the best logical page of each physical page.

    Logical pages that are not ``alive`` are ignored. ``alive`` broadcasts to ``[..., L]``.
    """
    pooled = scores.amax(dim=-2) if group == "max" else scores.mean(dim=-2) if group == "mean" else scores.sum(dim=-2)
    if alive is not None:
        pooled = pooled.masked_fill(~alive, -torch.inf)
    best: Tensor = pooled.unflatten(-1, (-1, per_page)).amax(dim=-1)
    return best


def alive(valid: Tensor, page: int) -> Tensor:
    """Return which logical pages have a valid key: ``[B | 1, N / page]`` from ``[B | 1, N]``."""
    result: Tensor = valid.unflatten(1, (-1, page)).any(dim=2)
    return result


def choose(scores: Tensor, classes: Tensor, budget: int, width: int) -> tuple[Tensor, Tensor]:
    """Select pages: int32 counts ``[...]`` and int32 page numbers ``[..., width]``, ascending and then zeros.

    ``scores`` and ``classes`` are ``[..., P]``. All pages of class ``KEPT`` are selected. Then the best ``OFFERED`` pages are
    added until there are ``budget`` pages. The lower page wins a tie, and NaN is the lowest score. ``width`` should have room
    for all selected pages; pages beyond it are dropped.
    """
    classes, least = classes.expand_as(scores), torch.finfo(scores.dtype).min
    rank = scores.nan_to_num(nan=least, posinf=-least, neginf=least)
    rank = rank.masked_fill(classes == KEPT, torch.inf).masked_fill(classes == HIDDEN, -torch.inf)
    order = rank.argsort(dim=-1, descending=True, stable=True)[..., :width]
    kept, seen = ((classes >= least_class).sum(dim=-1, keepdim=True) for least_class in (KEPT, OFFERED))
    count = torch.maximum(kept, seen.clamp(max=budget)).clamp(max=width)
    listed = torch.where(torch.arange(order.shape[-1], device=order.device) < count, order, scores.shape[-1])
    table = torch.zeros(*scores.shape[:-1], width, dtype=torch.int32, device=scores.device)
    listed = listed.sort(dim=-1).values
    table[..., : order.shape[-1]] = torch.where(listed < scores.shape[-1], listed, 0)
    return count.squeeze(-1).int(), table
