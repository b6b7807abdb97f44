"""Published policies by name, each built from a few masks. A size ``recent`` includes the query's own token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from sparse_compile import masks
from sparse_compile.head_profile import FullHeads, Profile, Table, masks_by_layer, read_table, with_ties
from sparse_compile.masks import Mask, causal, page_topk, sliding_window
from sparse_compile.masks.patterns.positional import at_least
from sparse_compile.policy import Policy

Pattern = Table | Profile


def dense() -> Policy:
    """Every head sees everything.

    >>> dense()
    Policy(causal)
    """
    return Policy(causal)


def streaming_llm(sink: int = 4, recent: int = 1020) -> Policy:
    """Every head sees the first ``sink`` tokens and the last ``recent`` (StreamingLLM, https://arxiv.org/abs/2309.17453).

    Build ``SparseCache(..., cache_positions=True)`` to place queries at cache positions, as the paper does. The paper's code
    does not count the query's own token in ``recent``: its 2000 are 2001 here.

        >>> streaming_llm(sink=4, recent=28)
        Policy(causal & (sink(4) | sliding_window(28)))
    """
    return Policy(_streaming(sink, recent))


def duo_attention(pattern: Pattern, sparsity: float = 0.5, sink: int | None = 64, recent: int | None = 256) -> Policy:
    """The share ``sparsity`` of all KV heads with the lowest gates streams (DuoAttention, https://arxiv.org/abs/2410.10819).

    ``pattern`` is a published folder (``full_attention_heads.tsv`` and ``config.json``), a tsv file, a ``Profile`` or its file,
    or the gates themselves, ``[layers, KV heads]``. Streaming heads see the first ``sink`` and the last ``recent`` tokens; None
    takes that size from the ``config.json`` or the ``Profile``. See ``full_heads`` for ties.

        >>> duo_attention([[0.9, 0.1], [0.2, 0.3]], sparsity=0.5, sink=2, recent=4).layers[1][1]
        per_head([causal & (sink(2) | sliding_window(4)), causal])

    Raises ``ValueError`` for gates that are not a table and for unknown sizes, and ``FileNotFoundError`` for missing files.
    """
    gates, sizes = _gates(pattern)
    sink, recent = (given if given is not None else sizes.get(name) for name, given in (("sink", sink), ("recent", recent)))
    if sink is None or recent is None:
        raise ValueError(f"{pattern} has no config.json with sink_size and recent_size: pass sink and recent")
    return Policy(layers=masks_by_layer(full_heads(gates, sparsity).full, _streaming(sink, recent)))


def lserve_static(
    pattern: Pattern, sparsity: float = 0.5, sink: int = 128, recent: int = 256, prefill_recent: int = 8192
) -> Policy:
    """The static half of LServe (https://arxiv.org/abs/2502.14866): DuoAttention with a wider window during prefill.

        >>> policy = lserve_static([[0.9, 0.1]], sink=2, recent=4, prefill_recent=8)
        >>> policy.mask_for("", 0, "decode")
        per_head([causal, causal & (sink(2) | sliding_window(4))])

    Raises the same errors as ``duo_attention``.
    """
    full = full_heads(_gates(pattern)[0], sparsity).full
    return Policy(
        prefill=Policy(layers=masks_by_layer(full, _streaming(sink, prefill_recent))),
        decode=Policy(layers=masks_by_layer(full, _streaming(sink, recent))),
    )


def quest(budget: int = 2048, *, page: int = 16, dense_layers: int = 2) -> Policy:
    """Decode steps read ``budget`` keys, from the pages with the highest scores (Quest, https://arxiv.org/abs/2406.10774).

    The first ``dense_layers`` layers and the prefill read everything. Quest selects pages of 16 keys for every query head. Its
    kernels follow the same rule as this policy with ``SparseCache(page_size=16)`` and as many KV heads as query heads. Storage
    pages of 64 are faster. Query heads that share a KV head select together, by their largest score. See ``page_topk``.

        >>> quest(1024, dense_layers=1).mask_for("", 1, "decode")
        causal & page_topk(1024)
    """
    return _chosen_above(dense_layers, causal & page_topk(budget, page=page))


def lserve(
    pattern: Pattern | None = None,
    *,
    budget: int = 4096,
    every: int = 4,
    page: int = 16,
    sparsity: float = 0.5,
    sink: int = 128,
    recent: int = 256,
    prefill_recent: int = 8192,
) -> Policy:
    """``lserve_static`` whose other heads read ``budget`` keys per step, selected every ``every`` steps (LServe, https://arxiv.org/abs/2502.14866).

    A storage page of 64 keys gets the score of its best ``page`` keys. LServe selects for each query head; here the query heads
    of a KV head select together. Without a ``pattern`` no head streams, and every head selects.

        >>> lserve([[0.9, 0.1]], budget=64, sink=2, recent=4).mask_for("", 0, "decode")
        per_head([causal & page_topk(64, every=4), causal & (sink(2) | sliding_window(4))])

    Raises the same errors as ``duo_attention``.
    """
    chosen = causal & page_topk(budget, page=page, every=every)
    if pattern is None:
        return Policy(prefill=causal, decode=chosen)
    full = full_heads(_gates(pattern)[0], sparsity).full
    return Policy(
        prefill=Policy(layers=masks_by_layer(full, _streaming(sink, prefill_recent))),
        decode=Policy(layers=masks_by_layer(full, _streaming(sink, recent), seeing=chosen)),
    )


def block_topk(pages: int = 64, *, page: int = 16, sink: int = 4, dense_layers: int = 1) -> Policy:
    """Decode steps read the ``pages`` pages with the best mean key, including the first ``sink`` tokens (Kinetics, https://arxiv.org/abs/2506.05333).

    The query heads of a KV head select by the mean of their scores. The prefill and the first ``dense_layers`` layers are
    dense. Kinetics reads pages of 16, as ``SparseCache(page_size=16)`` does. A larger storage page gets the score of its best
    ``page`` keys.

        >>> block_topk(8).mask_for("", 1, "decode")
        causal & (sink(4) | page_topk(128, score='mean', group='mean'))
    """
    chosen: Mask = page_topk(pages * page, page=page, score="mean", group="mean")
    return _chosen_above(dense_layers, causal & (masks.sink(sink) | chosen if sink else chosen))


def full_heads(gates: Tensor | Sequence[Sequence[float]], sparsity: float) -> FullHeads:
    """The heads whose gates reach the ``sparsity`` quantile of all gates, clipped to [0, 1], as DuoAttention chooses them.

    DuoAttention's code breaks ties with random noise. Here lower layers and heads win, and ties are logged. With ``sparsity``
    of 1 or more no head sees everything, and with 0 or less every head does.

        >>> full_heads([[1.0, 1.0], [1.0, 0.0]], 0.5)
        FullHeads(full=((True, True), (False, False)), tied=3, places=2)
    """
    table = [[min(max(float(gate), 0.0), 1.0) for gate in row] for row in gates]
    if not table or len({len(row) for row in table}) != 1 or not table[0]:
        raise ValueError("gates need to be a table with a row for each layer and a column for each KV head")
    ranked = sorted((-gate, layer, head) for layer, row in enumerate(table) for head, gate in enumerate(row))
    # Count the gates that reach numpy's quantile, which interpolates between two neighboring gates.
    count = len(ranked) - max(0, math.ceil((len(ranked) - 1) * sparsity - 1e-9)) if sparsity > 0 else len(ranked)
    count = 0 if sparsity >= 1 else count
    chosen = {(layer, head) for _, layer, head in ranked[:count]}
    full = tuple(tuple((layer, head) in chosen for head in range(len(row))) for layer, row in enumerate(table))
    return with_ties(full, ranked, count, "gate", f"sparsity {sparsity:g}")


def _chosen_above(dense_layers: int, step: Mask) -> Policy:
    """Apply ``step`` to decode steps, except in the first ``dense_layers`` layers."""
    at_least("dense_layers", dense_layers, 0)
    return Policy(prefill=causal, decode=Policy(step, layers={range(dense_layers): causal} if dense_layers else {}))


def _streaming(sink: int, recent: int) -> Mask:
    return causal & (masks.sink(sink) | sliding_window(recent))


def _gates(pattern: Pattern) -> tuple[Sequence[Sequence[float]], Mapping[str, int]]:
    """The gates, and the sink and window sizes that a published folder suggests."""
    if isinstance(pattern, str | Path) and Path(pattern).suffix == ".json":
        pattern = Profile.load(pattern)
    return (pattern.scores, pattern.numbers) if isinstance(pattern, Profile) else read_table(pattern)
