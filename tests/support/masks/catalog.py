"""One row per pattern and parameter of the mask language: an example, its meaning in one line of Python, and a drawing."""

from __future__ import annotations

import torch

from sparse_compile.masks import (
    causal,
    chunked,
    dilated,
    document,
    explicit,
    full,
    neighborhood,
    padding,
    per_head,
    prefix,
    sink,
    sliding_window,
    strided,
)
from support.masks.combined import COMBINED
from support.masks.grids import near, near_on_grid
from support.masks.row import Row

RUNS = [[0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 4, 4], [7, 7, 7, 7, 7, 7, 7, 7, 5, 5, 5, 5, 9, 9, 9, 9]]
SCATTERED = [[0, 1, 0, 2, 1, 1, 0, 3, 3, 0, 2, 2, 4, 0, 1, 1]]
LEFT = [[j >= 3 for j in range(16)], [j >= 9 for j in range(16)]]
RIGHT = [[j < 11 for j in range(16)], [j < 4 for j in range(16)]]
MIDDLE = [[2 <= j < 9 for j in range(16)]]
HOLES = [[j % 5 != 1 for j in range(16)], [False] * 16]
LENGTHS = [2, 7]
CHOSEN = [
    [[[(3 * b + 5 * h + 2 * i + j * j) % 7 < 4 for j in range(16)] for i in range(16)] for h in range(2)] for b in range(2)
]
STREAMING = causal & (sink(2) | sliding_window(3))

ROWS = [
    Row("causal", causal, lambda b, h, i, j: j <= i, tight=True, drawing="█··\n██·\n███"),
    Row("full", full, lambda b, h, i, j: True, tight=True, drawing="███\n███"),
    Row("nothing", ~full, lambda b, h, i, j: False, tight=True, drawing="···\n···"),
    Row("sink", sink(3), lambda b, h, i, j: j < 3, tight=True, drawing="███·\n███·"),
    Row("sink beyond the keys", sink(99), lambda b, h, i, j: True, tight=True, drawing="██\n██"),
    Row(
        "sliding_window",
        sliding_window(3),
        lambda b, h, i, j: j > i - 3,
        tight=True,
        drawing="█████\n█████\n█████\n·████\n··███",
    ),
    Row("sliding_window of one", sliding_window(1), lambda b, h, i, j: j >= i, tight=True, drawing="███\n·██\n··█"),
    Row("chunked", chunked(4), lambda b, h, i, j: i // 4 == j // 4, tight=True, drawing="████·\n████·\n████·\n████·\n····█"),
    Row("chunked by one", chunked(1), lambda b, h, i, j: i == j, tight=True, drawing="█··\n·█·\n··█"),
    Row("strided", strided(3), lambda b, h, i, j: j % 3 == 0, drawing="█··█·\n█··█·", tight=True),
    Row(
        "strided from an offset",
        strided(3, offset=5),
        lambda b, h, i, j: (j - 5) % 3 == 0,
        drawing="··█··█\n··█··█",
        tight=True,
    ),
    Row("strided by one", strided(1), lambda b, h, i, j: True, tight=True, drawing="██\n██"),
    Row(
        "dilated",
        dilated(2, 3),
        lambda b, h, i, j: (i - j) % 3 == 0 and abs(i - j) < 6,
        drawing="█··█··\n·█··█·\n··█··█\n█··█··",
        tight=True,
    ),
    Row("dilated by one", dilated(2, 1), lambda b, h, i, j: abs(i - j) < 2, tight=True, drawing="██·\n███\n·██"),
    Row("prefix", prefix(5), lambda b, h, i, j: j < 5, tight=True, drawing="█████·\n█████·"),
    Row("prefix of nothing", prefix(0), lambda b, h, i, j: False, tight=True, drawing="··\n··"),
    Row("prefix per batch", prefix(LENGTHS), lambda b, h, i, j: j < LENGTHS[b], batch=2, tight=True),
    Row(
        "document, contiguous",
        document(RUNS),
        lambda b, h, i, j: RUNS[b][i] == RUNS[b][j],
        batch=2,
        tight=True,
    ),
    Row(
        "document, for every batch",
        document(RUNS[:1]),
        lambda b, h, i, j: RUNS[0][i] == RUNS[0][j],
        batch=2,
        tight=True,
        drawing="███··\n███··\n███··\n···██\n···██",
    ),
    Row(
        "document, scattered",
        document(SCATTERED),
        lambda b, h, i, j: SCATTERED[0][i] == SCATTERED[0][j],
        drawing="█·█··\n·█··█\n█·█··\n···█·\n·█··█",
    ),
    Row("padding left", padding(LEFT), lambda b, h, i, j: LEFT[b][j], batch=2, tight=True),
    Row("padding right", padding(RIGHT), lambda b, h, i, j: RIGHT[b][j], batch=2, tight=True),
    Row("padding on both sides", padding(MIDDLE), lambda b, h, i, j: MIDDLE[0][j], tight=True, drawing="··███\n··███"),
    Row("padding with holes", padding(HOLES), lambda b, h, i, j: HOLES[b][j], batch=2),
    Row("padding in integers", padding([[0, 2] * 8]), lambda b, h, i, j: j % 2 == 1, drawing="·█·█\n·█·█"),
    Row(
        "neighborhood",
        neighborhood(16, 3),
        lambda b, h, i, j: near(i, j, 16, 3),
        tight=True,
        drawing="███··\n███··\n·███·\n··███",
    ),
    Row("neighborhood, even kernel", neighborhood(16, 4), lambda b, h, i, j: near(i, j, 16, 4), tight=True),
    Row(
        "neighborhood, causal", neighborhood(16, 5, causal=True), lambda b, h, i, j: near(i, j, 16, 5, causal=True), tight=True
    ),
    Row(
        "neighborhood, even kernel and stride",
        neighborhood(16, 4, stride=2),
        lambda b, h, i, j: near(i, j, 16, 4, stride=2),
        tight=True,
        drawing="████··\n████··\n·████·\n·████·",
    ),
    Row(
        "neighborhood, causal with a stride",
        neighborhood(16, 4, causal=True, stride=3),
        lambda b, h, i, j: near(i, j, 16, 4, 1, True, 3),
        tight=True,
        drawing="█····\n██···\n███··\n··██·\n··███",
    ),
    Row("neighborhood, dilated", neighborhood(16, 3, dilation=4), lambda b, h, i, j: near(i, j, 16, 3, 4), tight=True),
    Row("neighborhood, dilated unevenly", neighborhood(16, 2, dilation=5), lambda b, h, i, j: near(i, j, 16, 2, 5), tight=True),
    Row(
        "neighborhood, dilated and causal",
        neighborhood(16, 4, dilation=3, causal=True),
        lambda b, h, i, j: near(i, j, 16, 4, 3, True),
        tight=True,
    ),
    Row("neighborhood of the whole grid", neighborhood((4, 4), 4), lambda b, h, i, j: True, drawing="███\n███", tight=True),
    Row(
        "neighborhood smaller than the lengths",
        neighborhood(10, 3),
        lambda b, h, i, j: near_on_grid(i, j, (10,), (3,)),
        tight=True,
    ),
    Row(
        "neighborhood of a grid smaller than the lengths",
        neighborhood((3, 3), 3, causal=(True, False)),
        lambda b, h, i, j: near_on_grid(i, j, (3, 3), (3, 3), causal=(True, False)),
        tight=True,
    ),
    Row(
        "neighborhood, 2-D",
        neighborhood((4, 5), (3, 2)),
        lambda b, h, i, j: near_on_grid(i, j, (4, 5), (3, 2)),
        drawing="██···██···\n██···██···\n·██···██··",
        tight=True,
    ),
    Row(
        "neighborhood, 2-D, dilated and causal on one axis",
        neighborhood((8, 2), (3, 2), dilation=(2, 1), causal=(True, False)),
        lambda b, h, i, j: near_on_grid(i, j, (8, 2), (3, 2), (2, 1), (True, False)),
        tight=True,
    ),
    Row(
        "neighborhood, 2-D, dilated on both axes",
        neighborhood((4, 5), (2, 2), dilation=2),
        lambda b, h, i, j: near_on_grid(i, j, (4, 5), (2, 2), (2, 2)),
        tight=True,
    ),
    Row(
        "neighborhood, 3-D",
        neighborhood((3, 2, 3), (2, 1, 3)),
        lambda b, h, i, j: near_on_grid(i, j, (3, 2, 3), (2, 1, 3)),
        tight=True,
    ),
    Row(
        "neighborhood, 3-D, with strides",
        neighborhood((2, 3, 4), (2, 3, 3), stride=(1, 2, 3)),
        lambda b, h, i, j: near_on_grid(i, j, (2, 3, 4), (2, 3, 3), stride=(1, 2, 3)),
        tight=True,
    ),
    Row(
        "neighborhood, 3-D, dilated and causal",
        neighborhood((4, 2, 2), (2, 2, 1), dilation=(2, 1, 2), causal=(True, False, True)),
        lambda b, h, i, j: near_on_grid(i, j, (4, 2, 2), (2, 2, 1), (2, 1, 2), (True, False, True)),
        tight=True,
    ),
    Row(
        "per_head, one per query head",
        per_head([causal, sink(3), causal & sliding_window(2), causal]),
        lambda b, h, i, j: [j <= i, j < 3, i - 2 < j <= i, j <= i][h],
        heads=4,
        tight=True,
    ),
    Row(
        "per_head, one per KV head",
        per_head([causal, STREAMING]),
        lambda b, h, i, j: j <= i and (h < 2 or j < 2 or j > i - 3),
        heads=4,
        tight=True,
    ),
    Row(
        "per_head inside other nodes",
        ~(causal & per_head([sink(3), document(SCATTERED)])) | chunked(4),
        lambda b, h, i, j: not (j <= i and (j < 3 if h == 0 else SCATTERED[0][i] == SCATTERED[0][j])) or i // 4 == j // 4,
        heads=2,
    ),
    Row(
        "per_head of batches",
        per_head([padding(LEFT), document(RUNS), causal]),
        lambda b, h, i, j: [LEFT[b][j], RUNS[b][i] == RUNS[b][j], j <= i][h],
        batch=2,
        heads=3,
        tight=True,
    ),
    Row(
        "per_head of an explicit mask of two heads",
        per_head([causal, explicit(CHOSEN)]),
        lambda b, h, i, j: [j <= i, CHOSEN[b][h][i][j]][h],
        batch=2,
        heads=2,
        tight=True,
    ),
    Row("explicit", explicit(CHOSEN), lambda b, h, i, j: CHOSEN[b][h][i][j], batch=2, heads=2, tight=True),
    Row(
        "explicit, the same for all queries",
        explicit(torch.tensor(CHOSEN)[:1, :, :1]),
        lambda b, h, i, j: CHOSEN[0][h][0][j],
        batch=2,
        heads=2,
        tight=True,
    ),
    Row(
        "explicit, the same for all keys",
        explicit(torch.tensor(CHOSEN)[:, :1, :, :1]),
        lambda b, h, i, j: CHOSEN[b][0][i][0],
        batch=2,
        heads=2,
        tight=True,
    ),
    Row("streaming", STREAMING, lambda b, h, i, j: (j < 2 and j <= i) or i - 3 < j <= i, tight=True),
    Row(
        "prefix and causal in a left-padded batch",
        (causal | prefix(LENGTHS)) & padding(LEFT),
        lambda b, h, i, j: (j <= i or j < LENGTHS[b]) and LEFT[b][j],
        batch=2,
        tight=True,
    ),
    Row(
        "everything but a window",
        causal & ~sliding_window(4),
        lambda b, h, i, j: j <= i and not j > i - 4,
        tight=True,
        drawing="·····\n·····\n·····\n·····\n█····",
    ),
]
ROWS += COMBINED
TIGHT = [row for row in ROWS if row.tight]
