"""The rows of the catalog for masks that read another mask at other positions."""

from __future__ import annotations

import torch

from sparse_compile.masks import (
    causal,
    chunked,
    coarse,
    dilated,
    document,
    documents,
    explicit,
    neighborhood,
    of_queries,
    padding,
    per_head,
    periodic,
    prefix,
    repeated,
    shifted,
    sink,
    sliding_window,
    strided,
    within,
)
from support.masks.grids import near_on_grid
from support.masks.row import Row

Q_IDS = [[-1, 0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4], [0] * 6 + [1] * 10]
KV_IDS = [[0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 4, 4, 4, 4], [0] * 9 + [1] * 5]
UNSORTED = [[3, 1, 1, 0, 2, 2, 3, 3, 9, 0, 0, 1, 2, 2, 3, 1]]
STARTS = [[0, 0, 0, 3, 3, 3, 3, 7, 7, 9, 9, 9, 9, 9, 14, 14], [0] * 8 + [8] * 4 + [12] * 4]
TILES = [[0, 0, 1, 2, 2, 2, 3, 3]]
GLOBAL = [[i in (2, 9) for i in range(16)]]
TREE = [[[[(i + 2 * j) % 3 == 0 or i == j for j in range(12)] for i in range(16)]]]


def seen_of_distance(i: int, j: int) -> bool:
    """Return whether keys are at most one place apart on a ring of five."""
    return min((i - j) % 5, (j - i) % 5) < 2


def of_part(i: int, j: int, batch: int) -> bool:
    """Return whether two tokens share a document, and the key is its first one or just before the query."""
    start = STARTS[batch][i]
    return STARTS[batch][j] == start and (j == start or i - 2 < j <= i)


COMBINED = [
    Row(
        "coarse, block-causal",
        coarse(causal, q=2, kv=2),
        lambda b, h, i, j: j // 2 <= i // 2,
        tight=True,
        drawing="██··\n██··\n████\n████",
    ),
    Row(
        "coarse, tiles of other sizes",
        coarse(causal & strided(2), q=3, kv=2),
        lambda b, h, i, j: j // 2 <= i // 3 and j // 2 % 2 == 0,
        tight=True,
    ),
    Row("coarse, keys alone", coarse(dilated(2, 1), kv=3), lambda b, h, i, j: abs(i - j // 3) < 2, tight=True),
    Row(
        "coarse, tiles of documents",
        coarse(document(TILES), q=2, kv=2),
        lambda b, h, i, j: TILES[0][i // 2] == TILES[0][j // 2],
        tight=True,
    ),
    Row(
        "coarse, sliding tiles",
        coarse(neighborhood((2, 4), (1, 3)), q=2, kv=2),
        lambda b, h, i, j: i // 8 == j // 8 and abs(min(max(i // 2 % 4, 1), 2) - j // 2 % 4) < 2,
        tight=True,
    ),
    Row(
        "coarse, per head",
        coarse(per_head([causal, chunked(1)]), q=3, kv=3),
        lambda b, h, i, j: j // 3 <= i // 3 and (h == 0 or j // 3 == i // 3),
        heads=2,
        tight=True,
    ),
    Row(
        "shifted",
        shifted(causal, q=1, kv=2),
        lambda b, h, i, j: i >= 1 and 2 <= j <= i + 1,
        tight=True,
        drawing="·····\n··█··\n··██·\n··███",
    ),
    Row("shifted, ahead", shifted(causal, q=-2), lambda b, h, i, j: j <= i + 2, tight=True, drawing="███··\n████·"),
    Row("shifted, keys", shifted(strided(3), kv=2), lambda b, h, i, j: j >= 2 and (j - 2) % 3 == 0, tight=True),
    Row(
        "shifted, a grid after a prompt",
        shifted(neighborhood((3, 4), 3), q=3, kv=3) | sink(3) | of_queries(sink(3)),
        lambda b, h, i, j: min(i, j) < 3 or near_on_grid(i - 3, j - 3, (3, 4), (3, 3)),
    ),
    Row(
        "shifted, documents from a position on",
        shifted(document(STARTS[:1]), q=1, kv=1),
        lambda b, h, i, j: min(i, j) >= 1 and STARTS[0][i - 1] == STARTS[0][j - 1],
        tight=True,
    ),
    Row(
        "of_queries, the first ones",
        of_queries(sink(2)),
        lambda b, h, i, j: i < 2,
        tight=True,
        drawing="███\n███\n···",
    ),
    Row(
        "of_queries, global tokens",
        of_queries(padding(GLOBAL)) | padding(GLOBAL) | dilated(2, 1),
        lambda b, h, i, j: GLOBAL[0][i] or GLOBAL[0][j] or abs(i - j) < 2,
    ),
    Row("of_queries, every third", of_queries(strided(3)), lambda b, h, i, j: i % 3 == 0, tight=True),
    Row(
        "of_queries, a mask for some rows",
        of_queries(~sink(3)) & sliding_window(2),
        lambda b, h, i, j: i >= 3 and j > i - 2,
    ),
    Row(
        "periodic",
        periodic(chunked(1), 3),
        lambda b, h, i, j: (i - j) % 3 == 0,
        tight=True,
        drawing="█··█·\n·█··█\n··█··",
    ),
    Row("periodic, a ring", periodic(dilated(2, 1), 5), lambda b, h, i, j: seen_of_distance(i, j), tight=True),
    Row(
        "periodic, one side",
        causal & periodic(causal & sliding_window(2), 4),
        lambda b, h, i, j: j <= i and (i - j) % 4 < 2,
        tight=True,
    ),
    Row(
        "periodic, per head",
        ~periodic(per_head([chunked(1), dilated(2, 1)]), 5),
        lambda b, h, i, j: (i - j) % 5 != 0 if h == 0 else not seen_of_distance(i, j),
        heads=2,
        tight=True,
    ),
    Row(
        "repeated",
        repeated(causal, 3),
        lambda b, h, i, j: j % 3 <= i % 3,
        tight=True,
        drawing="█··█\n██·█\n████\n█··█",
    ),
    Row("repeated, a window", repeated(dilated(2, 1), 5), lambda b, h, i, j: abs(i % 5 - j % 5) < 2, tight=True),
    Row(
        "within a chunk",
        within(causal & sink(1), 3),
        lambda b, h, i, j: i // 3 == j // 3 and j % 3 == 0,
        tight=True,
        drawing="█···\n█···\n█···\n···█",
    ),
    Row("within a small chunk", within(~causal, 2), lambda b, h, i, j: i // 2 == j // 2 and j > i, tight=True),
    Row(
        "within a document",
        within(causal & (sink(1) | sliding_window(2)), STARTS),
        lambda b, h, i, j: of_part(i, j, b),
        batch=2,
        tight=True,
    ),
    Row(
        "within a scattered document",
        within(causal, document([[0, 1, 0, 1] + [2] * 12])),
        lambda b, h, i, j: j <= i and (i % 2 == j % 2 if max(i, j) < 4 else min(i, j) >= 4),
    ),
    Row(
        "documents",
        documents(Q_IDS, KV_IDS),
        lambda b, h, i, j: Q_IDS[b][i] == KV_IDS[b][j],
        batch=2,
        tight=True,
    ),
    Row("documents, unsorted", documents(Q_IDS[:1], UNSORTED), lambda b, h, i, j: Q_IDS[0][i] == UNSORTED[0][j]),
    Row(
        "explicit for the last keys",
        prefix(2) | explicit(TREE, kv_start=2),
        lambda b, h, i, j: j < 2 or TREE[0][0][i][j - 2],
        tight=True,
        drawing="███··█\n██·█··",
    ),
    Row(
        "explicit, rows in bits",
        explicit(torch.tensor(GLOBAL).view(1, 1, 16, 1)),
        lambda b, h, i, j: GLOBAL[0][i],
        tight=True,
        drawing="··\n··\n██",
    ),
]
