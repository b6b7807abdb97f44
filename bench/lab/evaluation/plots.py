"""Plot the CSVs of the quality bench: accuracy against bytes, needles by depth and length, perplexity by position."""

from __future__ import annotations

from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

from bench.measure.report import read

Rows = list[dict[str, str]]
COLUMNS = 4


def plot(folder: Path) -> None:
    """Draw each plot for which ``folder`` has rows. Needs matplotlib."""
    for name, draw in (("quality", _bytes), ("quality-depth", _depths), ("quality-perplexity", _perplexity)):
        rows = read(folder, name)
        if rows:
            draw(rows).savefig(folder / f"{name}.png", dpi=120)


def _bytes(rows: Rows) -> Any:
    from matplotlib import pyplot

    rows = [row for row in rows if row["question"] == "decoded" and _is_drawn(row)]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    count = -(-len(tasks) // COLUMNS)
    figure, grid = pyplot.subplots(count, COLUMNS, figsize=(16, 3.6 * count), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(_line(row) for row in rows))
    colors = dict(zip(dict.fromkeys(name for name, _ in names), cycle(pyplot.get_cmap("tab20")(range(20))), strict=False))
    for axes, task in zip(grid.flat, tasks, strict=False):
        asked = [row for row in rows if row["task"] == task]
        for name, prefill in names:
            points = _mean_points([row for row in asked if _line(row) == (name, prefill)])
            if points:
                style = {"color": colors[name], "linestyle": "--" if prefill == "chunk_relaxed" else "-"}
                label = name if prefill == "strict" else f"{name}, relaxed prefill"
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, **style)
        axes.set(title=f"{task}, {asked[0]['length']} tokens", ylim=(-0.03, 1.03), xlabel="bytes held (pages: read) of dense")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.set_axis_off()
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=9)
    figure.suptitle(
        f"Exact match against bytes, {rows[0]['gpu']}, torch {rows[0]['torch']}, checkpoint {rows[0]['checkpoint']}"
    )
    return figure


def _is_drawn(row: dict[str, str]) -> bool:
    return not row["method"].startswith("without")


def _line(row: dict[str, str]) -> tuple[str, str]:
    """Return the name and the prefill of a row's line. Random heads of all seeds share a line; other methods go by name."""
    name = row["method"].split(", a quarter")[0]
    return ("random heads" if name.startswith("random") else name), row["prefill"]


def _mean_points(rows: Rows) -> list[tuple[float, float]]:
    at = defaultdict(list)
    for row in rows:
        share = float(row["held"] if row["counts"] == "held" else row["read"])
        at[round(share, 3)].append(float(row["accuracy"]))
    return sorted((share, sum(found) / len(found)) for share, found in at.items())


def _depths(rows: Rows) -> Any:
    from matplotlib import pyplot

    methods = list(dict.fromkeys(row["method"] for row in rows))
    lengths = sorted({int(row["length"]) for row in rows})
    depths = sorted({float(row["depth"]) for row in rows})
    figure, grid = pyplot.subplots(1, len(methods), figsize=(4 * len(methods), 3.6), layout="constrained", squeeze=False)
    picture: Any = None
    for axes, method in zip(grid.flat, methods, strict=True):
        found = {(float(row["depth"]), int(row["length"])): float(row["accuracy"]) for row in rows if row["method"] == method}
        shares = [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
        picture = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, line in enumerate(shares):
            for x, share in enumerate(line):
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=9)
        axes.set(title=method, xlabel="tokens", ylabel="depth of the needle")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    figure.colorbar(picture, ax=list(grid.flat), label="exact match")
    figure.suptitle("One needle, under what a quarter of the bytes of the longest context buys")
    return figure


def _perplexity(rows: Rows) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        points = [(int(row["position"]), float(row["perplexity"])) for row in rows if row["method"] == method]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=method)
    axes.set(xlabel="position", ylabel="perplexity of a byte of held-out code", title="Perplexity by position")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure
