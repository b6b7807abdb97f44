"""Compare with kvpress (https://github.com/NVIDIA/kvpress): the same checkpoint and items at equal bytes.

This takes two environments. ``items`` and ``ours`` run where sparse_compile is installed, ``theirs`` runs where kvpress is
installed, and ``table`` runs in either.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.lab.data.items import Items
from bench.lab.evaluation.presses import FULL, asked, presses
from bench.lab.evaluation.rows import Table, wilson
from bench.lab.model import CHECKPOINT, load
from bench.measure.timing import RESULTS, environment

if TYPE_CHECKING:  # the environment of ``theirs`` has no sparse_compile
    from bench.lab.evaluation.jobs import Size
    from bench.lab.evaluation.methods import Method

TASKS, LENGTH, BUDGETS, BATCH = ("single", "multi_key", "multi_query", "turns"), 512, (1 / 2, 1 / 4, 1 / 8), 50


@dataclass(frozen=True)
class Beside:
    """How often a method of one library is right, and its bytes at the end of an item as shares of a dense 16-bit cache.

    ``held`` is what its keys and values hold. ``counted`` is what its budget counts: the bytes held, the bytes read by a step,
    or the bytes that would be held if masked keys were freed.
    """

    method: str
    library: str
    budget: float
    task: str
    question: str
    length: int
    items: int
    accuracy: float
    low: float
    high: float
    held: float
    counted: float
    note: str
    gpu: str
    torch: str
    commit: str
    date: str


def write_items(folder: Path, gates: Sequence[Sequence[float]], size: Size, length: int, tasks: Sequence[str] = TASKS) -> None:
    """Write ``items.safetensors``: contexts, questions and answers of all tasks, and the scores of heads."""
    from bench.lab.evaluation.jobs import Cell, made

    tensors: dict[str, Tensor] = {}
    for task in tasks:
        items = made(Cell(task, length), size)
        parts = [items.context, *(part for turn in items.turns for part in turn)]
        tensors |= {f"{task}.{at}": part.contiguous() for at, part in enumerate(parts)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "items.safetensors", {"gates": json.dumps(gates), "tasks": " ".join(tasks)})


def read_items(folder: Path) -> tuple[dict[str, Items], list[list[float]]]:
    """Return the items by task and the scores of heads that ``write_items`` wrote."""
    by_task: dict[str, Items] = {}
    with safe_open(folder / "items.safetensors", "pt") as file:
        for task in file.metadata()["tasks"].split():
            count = sum(name.startswith(f"{task}.") for name in file.keys())  # noqa: SIM118 (no dictionary)
            context, *rest = (file.get_tensor(f"{task}.{at}") for at in range(count))
            by_task[task] = Items(context, tuple(zip(rest[::2], rest[1::2], strict=True)))
        return by_task, json.loads(file.metadata()["gates"])


def ours(folder: Path, size: Size, budgets: Sequence[float] = BUDGETS) -> None:
    """Write ``ours.csv``: full attention, sink and recent tokens, heads by gates, and pages.

    They run in a session of the quality bench.
    """
    from bench.lab.evaluation import methods
    from bench.lab.evaluation.budgets import dense_bytes, held_bytes, read_bytes
    from bench.lab.session import Session
    from sparse_compile.head_profile import Profile

    by_task, gates = read_items(folder)
    length = next(iter(by_task.values())).tokens().shape[1]
    chosen: list[Method] = [methods.FULL]
    for budget in budgets:
        chosen += [methods.by_heads("gates", Profile(gates), budget, length).relaxed()]  # kvpress has no other prefill
        chosen += [methods.sink_and_recent(budget, length).relaxed(), methods.pages("minmax", budget, length)]
    table = Table(folder / "ours.csv", Beside)
    for method in chosen:
        session = Session(size.model(), method, rows=min(BATCH, size.items), length=length)
        dense = dense_bytes(session.cache)
        held, read = held_bytes(session.cache) / dense, read_bytes(session.cache) / dense
        counted, note = (held, "") if method.counts == "held" else (read, "budget counts keys read; all is held")
        for task, items in by_task.items():
            cell = (method.name, "sparse_compile", method.budget, task, "decoded", length)
            table.add([_row(cell, session.right(items).all(1), held, counted, note)])


def theirs(folder: Path, checkpoint: Path, budgets: Sequence[float] = BUDGETS) -> None:
    """Write ``theirs.csv``: presses on a stock model. Tokens after the context are decoded as in ``bench.lab.session``."""
    model: Any = load(checkpoint)
    model.to(torch.bfloat16)
    by_task, gates = read_items(folder)
    library = f"kvpress {importlib.metadata.version('kvpress')}, transformers {importlib.metadata.version('transformers')}"
    table = Table(folder / "theirs.csv", Beside)
    for task, items in by_task.items():
        length = items.tokens().shape[1]
        for question in ("decoded", "prefilled"):
            begin = items.context.shape[1] + (items.turns[0][0].shape[1] if question == "prefilled" else 0)
            pressed = [one for budget in budgets for one in presses(length, begin, gates, budget)]
            pressed = [one for one in pressed if one.name == "SnapKV"] if question == "prefilled" else [FULL, *pressed]
            for one, (right, held) in zip(pressed, asked(model, items, begin, pressed, rows=BATCH), strict=True):
                cell = (one.name, library, one.budget, task, question, length)
                table.add([_row(cell, right, held, held - one.masked, one.note)])


def _row(cell: Sequence[Any], right: Tensor, held: float, counted: float, note: str) -> Beside:
    count, total = int(right.sum()), len(right)
    print(*cell, f"{count / total:.1%}, held {held:.3f}, counted {counted:.3f}, {note}", flush=True)
    row: Any = (*cell, total, count / total, *wilson(count, total), held, counted, note)
    return Beside(*row, **environment())


def table(folder: Path, out: Path) -> str:
    """Write ``kvpress.csv`` in ``out`` from ``ours.csv`` and ``theirs.csv``, and return the accuracies as a Markdown table."""
    rows = [row for name in ("theirs", "ours") for row in Table(folder / f"{name}.csv", Beside).rows.values()]
    with (out / "kvpress.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Beside)])
        writer.writeheader()
        writer.writerows(rows)
    lines: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        line = row["library"].split(",")[0], row["method"], row["question"], row["budget"]
        lines.setdefault(line, {})[row["task"]] = row
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    markdown = ["| budget | library | method | question | held | counted | " + " | ".join(tasks) + " |"]
    markdown.append("| ---: | --- | --- | --- | ---: | ---: |" + " ---: |" * len(tasks))
    for (library, method, question, budget), cells in sorted(lines.items(), key=lambda line: -float(line[0][3])):
        shares = [f"{max(float(cell[name]) for cell in cells.values()):.3f}" for name in ("held", "counted")]
        accuracies = [f"{float(cells[task]['accuracy']):.1%}" if task in cells else "" for task in tasks]
        markdown.append("| " + " | ".join([budget, library, method, question, *shares, *accuracies]) + " |")
    return "\n".join(markdown)


def main() -> None:
    """Run one part of the comparison: ``python -m bench.lab.kvpress_bench PART``."""
    parser = argparse.ArgumentParser(prog="bench.lab.kvpress_bench", description=__doc__)
    parser.add_argument("part", choices=("items", "ours", "theirs", "table"))
    parser.add_argument("--folder", type=Path, required=True, help="folder of the items and of the results of both sides")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV of the table")
    chosen = parser.parse_args()
    if chosen.part == "table":
        print(table(chosen.folder, chosen.out))
    elif chosen.part == "theirs":
        theirs(chosen.folder, chosen.model)
    else:
        from bench.lab.evaluation.jobs import Size

        size = Size(chosen.model, items=100, seeds=2)
        gates = json.loads((chosen.model / "gates.json").read_text("utf-8"))["profile"]["scores"]
        ours(chosen.folder, size) if chosen.part == "ours" else write_items(chosen.folder, gates, size, LENGTH)


if __name__ == "__main__":
    main()
