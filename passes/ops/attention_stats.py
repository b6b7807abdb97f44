"""Add up statistics of attention weights while a compiled graph runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.masks import Mask, ScoreMod
from sparse_compile.passes.storage.graph_text import from_text, rides_in_graphs

BLOCK_BYTES = 64 << 20  # of float32 weights in memory at once


STATISTICS = ("sink", "recent", "entropy", "rate", "echo", "induction")


@rides_in_graphs
@dataclass(frozen=True)
class Look:
    """What to measure: the attention mass on the first ``sink`` and the last ``recent`` keys, and on pages of ``page`` keys.

    If the text repeats itself every ``period`` tokens from token ``start`` on, two more masses are measured (RazorAttention,
    arXiv:2407.15891). *Echo* is the mass on earlier copies of a token. *Induction* is the mass on the tokens that followed
    those copies. A period of 0 means that the text does not repeat. The sink rate (arXiv:2410.10781) is computed from the mass
    on the first key of the first ``rate`` queries.
    """

    sink: int = 4
    recent: int = 64
    page: int = 64
    period: int = 0
    start: int = 0
    rate: int = 64


@rides_in_graphs
@dataclass(frozen=True)
class Watch:
    """An attention call to observe: what to measure, the mask, and how scores become weights."""

    look: Look
    mask: Mask
    score_mod: ScoreMod | None
    scale: float


@torch.library.custom_op("sparse_compile::add_weights", mutates_args=("totals", "pages"))
def add_weights(q: Tensor, k: Tensor, totals: Tensor, pages: Tensor, watch: str) -> None:
    """Add the statistics of ``q`` ``[B, Hq, N, D]`` and ``k`` ``[B, Hkv, N, D]`` to ``totals`` and ``pages``.

    ``totals`` ``[Hq, statistics, 2]`` and ``pages`` ``[Hq, pages, 2]`` hold sums, and the numbers of queries in them.
    """
    what: Watch = from_text(watch)
    batch, heads, length, _ = q.shape
    rows = max(1, BLOCK_BYTES // (4 * heads * length))
    for row in range(batch):
        for first in range(0, length, rows):
            _add(q[row, :, first : first + rows], k[row], totals, pages, first, what)


@add_weights.register_fake
def _(q: Tensor, k: Tensor, totals: Tensor, pages: Tensor, watch: str) -> None:
    return None


def _add(q: Tensor, k: Tensor, totals: Tensor, pages: Tensor, first: int, watch: Watch) -> None:
    """Add the statistics of queries ``[Hq, rows, D]``, which start at position ``first``, over keys ``[Hkv, N, D]``."""
    look, (heads, rows, _) = watch.look, q.shape
    last = first + rows  # attention is causal, so later keys are left out
    i = torch.arange(first, last, device=q.device).view(1, -1, 1)
    j = torch.arange(last, device=q.device).view(1, 1, -1)
    h = torch.arange(heads, device=q.device).view(-1, 1, 1)
    b = torch.zeros_like(h)
    group = q.reshape(k.shape[0], -1, q.shape[2]).float()  # [Hkv, G * rows, D]
    scores = (group @ k[:, :last].float().transpose(1, 2)).view(heads, rows, last) * watch.scale
    if watch.score_mod is not None:
        scores = watch.score_mod(scores, b, h, i, j)
    scores = scores.masked_fill(~watch.mask.for_heads(heads)(b, h, i, j), -torch.inf)
    lse = scores.logsumexp(dim=2, keepdim=True)
    weights = (scores - lse).exp()
    behind = i - j
    where = {"sink": j < look.sink, "recent": behind < look.recent}
    of_rows = {"sink": i >= look.sink + look.recent, "recent": i >= look.sink + look.recent}
    if look.period:
        older = behind >= look.period - 1
        where |= {
            "echo": older & (j >= look.start) & (behind % look.period == 0),
            "induction": older & (j > look.start) & (behind % look.period == look.period - 1),
        }
        of_rows |= dict.fromkeys(("echo", "induction"), i >= look.start + look.period)
    every = torch.ones_like(i)
    for name, keys in where.items():
        _note(totals, name, (weights * keys).sum(2), of_rows[name])
    # A weight of 0 adds nothing to the entropy, although its logarithm is -inf.
    _note(totals, "entropy", -(weights * (scores - lse).masked_fill(weights == 0, 0)).sum(2), every)
    _note(totals, "rate", weights[:, :, 0], i < look.rate)
    padded = torch.nn.functional.pad(weights.sum(1), (0, pages.shape[1] * look.page - last))
    pages[:, :, 0] += padded.view(heads, -1, look.page).sum(2)
    pages[:, :, 1] += rows


def _note(totals: Tensor, name: str, numbers: Tensor, rows: Tensor) -> None:
    """Add ``numbers`` ``[Hq, queries]`` to statistic ``name``, for the queries where ``rows`` ``[1, queries, 1]`` is true."""
    at = STATISTICS.index(name)
    counted = rows.view(1, -1)
    totals[:, at, 0] += (numbers * counted).sum(1)
    totals[:, at, 1] += counted.sum()
