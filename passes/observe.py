"""Watch attention: for every head, how much its weights put where, summed up while a compiled graph runs.

Weights are computed anew from queries and keys, a block of queries at a time: no N x N matrix is ever held.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.masks import Mask, ScoreMod
from sparse_compile.passes.call import AttentionCall, Refused
from sparse_compile.passes.graph import attach, expr_of, hint_of
from sparse_compile.passes.rewrite import Rewrite, phase_of
from sparse_compile.passes.tables import given

BLOCK_BYTES = 64 << 20  # of float32 weights
STATISTICS = ("sink", "recent", "entropy", "rate", "echo", "induction")


@dataclass(frozen=True)
class Look:
    """What is looked for: the mass on the first ``sink`` and the last ``recent`` keys, and on pages of ``page`` keys.

    A text that from token ``start`` on repeats itself every ``period`` tokens shows *echo*, the mass on earlier copies of a
    token, and *induction*, that on the tokens which followed them (RazorAttention, arXiv:2407.15891); a period of 0 is a text
    that does not. ``rate`` is the number of first queries whose mass on the first key makes the sink rate (arXiv:2410.10781).
    """

    sink: int = 4
    recent: int = 64
    page: int = 64
    period: int = 0
    start: int = 0
    rate: int = 64


@dataclass(frozen=True)
class Watch:
    """A call to watch: what it sees, and how scores become weights."""

    look: Look
    mask: Mask
    score_mod: ScoreMod | None
    scale: float


def watch_attention(rewrite: Rewrite, *, look: Look, sums: Callable[[int, int, int], tuple[Tensor, Tensor]]) -> int:
    """Before every causal call of a layer, add what its heads do to ``sums(layer, heads, keys)``.

    Those are float64: totals ``[Hq, len(STATISTICS), 2]`` with the number of queries they are of, and pages ``[Hq, pages, 2]``.
    Raises ``Refused`` for a call whose weights depend on tensors beside queries and keys, or that continues a text.
    """
    seen = 0
    for call in rewrite.calls:
        if phase_of(call) != "prefill":
            continue
        try:
            _check(call)
            totals_and_pages = sums(call.layer or 0, call.heads, hint_of(call.size("k", 2)))
        except ValueError as error:
            raise Refused(error) from error
        assert call.mask is not None and call.layer is not None
        text = base64.b64encode(pickle.dumps(Watch(look, call.mask, call.score_mod, call.scale))).decode()
        names = []
        for name, tensor in zip(("totals", "pages"), totals_and_pages, strict=True):
            names.append(f"sparse_{name}_{call.layer}")
            attach(rewrite.gm, names[-1], tensor)
        with rewrite.gm.graph.inserting_before(call.node):
            totals, pages = (rewrite.gm.graph.get_attr(name) for name in names)
            rewrite.gm.graph.call_function(add_weights._opoverload, (call.q, call.k, totals, pages, text))
        seen += 1
    return seen


def _check(call: AttentionCall) -> None:
    where = call.module or call.node.name
    if call.layer is None:
        raise ValueError(f"{where} belongs to no numbered layer, and heads are told apart by layer")
    at = call.positions
    if at is None or expr_of(at.q_start) != 0 or expr_of(at.kv_start) != 0 or at.q_shift is not None:
        raise ValueError(f"{where} continues a text ({at}): observe whole texts, without a cache")
    assert call.mask is not None
    captures = (*given(call.mask), *(call.score_mod.captures() if call.score_mod is not None else ()))
    if captures:
        raise ValueError(
            f"the attention of {where} reads {', '.join(str(c) for c in captures)} beside queries and keys: observe texts "
            "without padding, and models without learned biases or sinks"
        )


@torch.library.custom_op("sparse_compile::add_weights", mutates_args=("totals", "pages"))
def add_weights(q: Tensor, k: Tensor, totals: Tensor, pages: Tensor, watch: str) -> None:
    """Add what heads do with ``q`` ``[B, Hq, N, D]`` and ``k`` ``[B, Hkv, N, D]`` to ``totals`` and ``pages``."""
    what: Watch = pickle.loads(base64.b64decode(watch))
    batch, heads, length, _ = q.shape
    rows = max(1, BLOCK_BYTES // (4 * heads * length))
    for row in range(batch):
        for first in range(0, length, rows):
            _add(q[row, :, first : first + rows], k[row], totals, pages, first, what)


@add_weights.register_fake
def _(q: Tensor, k: Tensor, totals: Tensor, pages: Tensor, watch: str) -> None:
    return None


def _add(q: Tensor, k: Tensor, totals: Tensor, pages: Tensor, first: int, watch: Watch) -> None:
    """Queries ``[Hq, rows, D]`` from ``first`` on, over keys ``[Hkv, N, D]``."""
    look, (heads, rows, _) = watch.look, q.shape
    last = first + rows  # causal: no key beyond
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
    # Where a weight is 0 its logarithm counts for nothing.
    _note(totals, "entropy", -(weights * (scores - lse).masked_fill(weights == 0, 0)).sum(2), every)
    _note(totals, "rate", weights[:, :, 0], i < look.rate)
    padded = torch.nn.functional.pad(weights.sum(1), (0, pages.shape[1] * look.page - last))
    pages[:, :, 0] += padded.view(heads, -1, look.page).sum(2)
    pages[:, :, 1] += rows


def _note(totals: Tensor, name: str, numbers: Tensor, rows: Tensor) -> None:
    """Add ``numbers`` ``[Hq, rows]`` of those ``rows`` ``[1, rows, 1]`` that count."""
    at = STATISTICS.index(name)
    counted = rows.view(1, -1)
    totals[:, at, 0] += (numbers * counted).sum(1)
    totals[:, at, 1] += counted.sum()
