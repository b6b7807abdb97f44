"""The rules of page selection in plain PyTorch: what describes a page, how queries score it, which pages are kept.

A *physical* page is what the cache stores and attention visits (64 keys), a *logical* page is what is described (16 keys): a
physical page is worth what its best logical page is (LServe, https://arxiv.org/abs/2502.14866).
"""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN, OFFERED, KEPT = 0, 1, 2  # classes of pages: none of their keys may be seen, the budget decides, always kept


def digest_width(score: str, dim: int) -> int:
    """How many numbers describe a logical page; 0 where the keys themselves are read."""
    return {"minmax": 2 * dim, "mean": dim, "keys": 0}[score]


def describe(keys: Tensor, valid: Tensor | None, page: int, score: str) -> Tensor:
    """The digests ``[B, H, N / page, width]`` of keys ``[B, H, N, D]``, in their dtype; those count that are ``valid`` ``[B |
    1, N]``.

    ``minmax`` is the least and the largest of each channel (Quest, https://arxiv.org/abs/2406.10774), side by side; ``mean``
    the mean. A page without a valid key has zeros, and should not be scored (``alive``).
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


def score_digests(q: Tensor, digest: Tensor, score: str) -> Tensor:
    """What queries ``[B, H, G, D]`` may find in logical pages ``[B, H, L, width]``: fp32 ``[B, H, G, L]``.

    Of ``minmax`` it is ``sum_d max(q_d * min_d, q_d * max_d)``, which no key of the page exceeds, as one matrix product:
    negative parts of q meet the minima, positive ones the maxima. (The textbook ``q @ min + relu(q) @ (max - min)`` rounds a
    difference.)
    """
    q = q.float()
    if score == "minmax":
        q = torch.cat([q.clamp(max=0), q.clamp(min=0)], dim=-1)
    return q @ digest.float().transpose(-1, -2)


def score_keys(q: Tensor, keys: Tensor, valid: Tensor | None, page: int) -> Tensor:
    """The largest product of queries ``[B, H, G, D]`` with valid keys ``[B, H, N, D]``: fp32 ``[B, H, G, N / page]``."""
    products = q.float() @ keys.float().transpose(-1, -2)
    if valid is not None:
        products = products.masked_fill(~valid[:, None, None, :], -torch.inf)
    best: Tensor = products.unflatten(-1, (-1, page)).amax(dim=-1)
    return best


def pool(scores: Tensor, group: str, per_page: int, alive: Tensor | None = None) -> Tensor:
    """Scores ``[..., G, L]`` pooled over the query heads of a KV head, then over the logical pages of each physical one.

    Logical pages that are not ``alive``, of a shape like ``[..., L]``, count for nothing.
    """
    pooled = scores.amax(dim=-2) if group == "max" else scores.mean(dim=-2) if group == "mean" else scores.sum(dim=-2)
    if alive is not None:
        pooled = pooled.masked_fill(~alive, -torch.inf)
    best: Tensor = pooled.unflatten(-1, (-1, per_page)).amax(dim=-1)
    return best


def alive(valid: Tensor, page: int) -> Tensor:
    """Which logical pages have a valid key: ``[B | 1, N / page]`` of ``[B | 1, N]``."""
    found: Tensor = valid.unflatten(1, (-1, page)).any(dim=2)
    return found


def choose(scores: Tensor, classes: Tensor, budget: int, width: int) -> tuple[Tensor, Tensor]:
    """The pages that are kept: counts ``[...]`` and page numbers ``[..., width]`` in ascending order, zeros after them; int32.

    ``scores`` and ``classes`` are ``[..., P]``. All pages of class ``KEPT``, and of those that are ``OFFERED`` the best, until
    there are ``budget`` pages; of equal scores the lower page, and NaN is the lowest score. ``width`` is room for all that are
    kept.
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
