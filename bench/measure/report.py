"""Draw plots and write the README's table from the CSV files of a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from bench.measure.timing import RESULTS

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
GENERATE_BEGIN, GENERATE_END = "<!-- generate: begin -->", "<!-- generate: end -->"


def report(folder: Path = RESULTS) -> None:
    """Draw ``prefill.png`` and ``decode.png`` and write the README's table."""
    plot(folder)
    README.write_text(with_table(README.read_text("utf-8"), folder), encoding="utf-8")


def read(folder: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of one CSV, or no rows if the file does not exist."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def with_table(text: str, folder: Path = RESULTS) -> str:
    """Return ``text`` with new tables between their markers."""
    for begin, end, table in ((BEGIN, END, markdown(folder)), (GENERATE_BEGIN, GENERATE_END, generate_table(folder))):
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def generate_table(folder: Path) -> str:
    """Return the README's table of ``generate``: the whole model at its longest prompt."""
    rows = read(folder, "generate")
    most = max((int(row["layers"]), int(row["prompt"])) for row in rows)
    rows = [row for row in rows if (int(row["layers"]), int(row["prompt"])) == most]
    lines = ["| | first token | ms a token | KV cache | peak memory | first call, compiles |", "|---|---|---|---|---|---|"]
    for row in rows:
        memory = " | ".join(f"{float(row[name]):.1f} GiB" for name in ("cache_gib", "peak_gib"))
        times = f"{float(row['first_token_s']):.1f} s | {float(row['p50_ms']):.2f}"
        lines.append(f"| {row['method']} | {times} | {memory} | {float(row['first_call_s']):.0f} s |")
    first = rows[0]
    where = f"{first['gpu']}, torch {first['torch']}, transformers {first['transformers']}, bfloat16, {first['date']}"
    shape = f"{first['shape']}'s shape, random weights, a prompt of {int(first['prompt']):,} tokens"
    notes: dict[str, list[str]] = {}
    for row in rows:
        notes.setdefault(row["notes"], []).append(row["method"])
    noted = [f"{' and '.join(methods)} {note}." for note, methods in notes.items() if note]
    return "\n".join([*lines, "", " ".join([f"{shape}, 64 new tokens. {where}.", *noted])])


def markdown(folder: Path) -> str:
    """Return the README's table of headline results."""
    names = ("model", "cache", "select-attention", "select-model", "quantized-attention", "quantized-model")
    rows = [row for name in names for row in read(folder, name) if _is_headline(name, row)]
    lines = ["| what | keys | kernel | ms | against | ratio | of the bound |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        share = f"{float(row['share']):.0%}" if row["share"] else ""
        ratio = f"{float(row['ratio']):.2f}x" if row["ratio"] else ""
        against = f"{row['baseline']} ({_short(row['baseline_p50'])} ms)" if row["baseline"] else ""
        keys = f"{int(row['kv_len']):,}"
        part = f"{row['bench']} attention, " if row["bench"] in ("prefill", "decode") else ""
        what = f"{row['shape'].split(' ')[0]}: {part}{row['what']}" if part else f"{row['shape']}: {row['what']}"
        lines.append(f"| {what} | {keys} | {row['kernel']} | {_short(row['p50'])} | {against} | {ratio} | {share} |")
    if rows:
        first = rows[0]
        lines += ["", f"{first['gpu']}, torch {first['torch']}, {first['dtype']}, {first['date']}."]
    return "\n".join(lines)


LONGEST, MOST = "1000000", "6000000"  # contexts of Llama-3-8B: over a SparseCache, and over one in int4
DROPPED = ("prefill, eager", "prefill, all streaming", "decode step, all streaming, batch 1")


def _is_headline(name: str, row: dict[str, str]) -> bool:
    if name == "quantized-attention":
        return row["what"].split(", ")[1] == "int8" and "all keys" in row["what"]
    if name == "quantized-model":
        return row["kv_len"] == MOST
    if name == "select-model":
        return bool(row["baseline"]) and "dense" not in row["what"]
    if "page_topk" in row["mask"]:
        return row["shape"].startswith("Llama-3") and "every" not in row["what"] and row["kv_len"] != "524288"
    if name == "cache":
        return row["shape"] == "Llama-3-8B" and row["kv_len"] == LONGEST and "dense" not in row["what"]
    short = row["kv_len"] in ("8192", "16384")
    whole = row["shape"] == "Llama-3-8B"  # the other models are cut to a few layers
    return whole and row["what"] not in DROPPED and row["baseline"] != "eager" and not short


def _short(number: str) -> str:
    value = float(number)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def plot(folder: Path) -> None:
    """Plot milliseconds against length, and the achieved share of the bound against density. Needs matplotlib."""
    from matplotlib import pyplot

    for name in ("prefill", "decode"):
        rows = [row for row in read(folder, name) if row["shape"].startswith("Llama-3") and "batch 8" not in row["what"]]
        if not rows:
            continue
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
        _lengths(left, rows, name)
        _shares(right, rows)
        figure.suptitle(f"{name} attention, {rows[0]['shape']}, {rows[0]['gpu']}, torch {rows[0]['torch']}")
        figure.savefig(folder / f"{name}.png", dpi=120)
        pyplot.close(figure)


def _lengths(axes: Any, rows: list[dict[str, str]], name: str) -> None:
    baseline = {int(row["kv_len"]): float(row["baseline_p50"]) for row in rows}
    axes.plot(*zip(*sorted(baseline.items()), strict=True), "k--o", label=rows[0]["baseline"])
    for what in dict.fromkeys(row["what"] for row in rows):
        points = [(int(row["kv_len"]), float(row["p50"])) for row in rows if row["what"] == what]
        axes.plot(*zip(*sorted(points), strict=True), "-o", label=what)
    axes.set(xscale="log", yscale="log", xlabel="keys", ylabel=f"ms per layer, {name}")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _shares(axes: Any, rows: list[dict[str, str]]) -> None:
    for what in dict.fromkeys(row["what"] for row in rows):
        points = [(float(row["density"]), float(row["share"])) for row in rows if row["what"] == what]
        axes.plot(*zip(*sorted(points), strict=True), "-o", label=what)
    axes.set(xscale="log", ylim=(0, 1.05), xlabel="density", ylabel="share of the physical bound")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
