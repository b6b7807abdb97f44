"""Rows of results: accuracies with their intervals, and the CSV files that hold them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Row:
    """How often a method is right on a task.

    ``held`` and ``read`` are shares of a dense cache of 16-bit numbers: what the cache of this length holds, and what the last
    step reads. An item is right if all its turns are right. ``turn_accuracy`` is the share of right turns, and ``by_turn`` is
    that share for each turn, in order. ``by_seed`` is the share of right items for each seed. ``low`` and ``high`` are the 95 %
    Wilson interval of ``accuracy``.
    """

    method: str
    budget: float
    counts: str
    held: float
    read: float
    held_bytes: int
    prefill: str
    question: str
    task: str
    length: int
    depth: float
    seeds: int
    items: int
    accuracy: float
    low: float
    high: float
    turn_accuracy: float
    by_turn: str
    by_seed: str
    seconds: float
    checkpoint: str
    gpu: str
    torch: str
    commit: str
    date: str

    @property
    def cell(self) -> str:
        """The name of the cell: its task and length, and its depth and question if they are not the default."""
        depth = "" if math.isnan(self.depth) else f" at {self.depth:g}"
        return f"{self.task} {self.length}{depth}" + (f" {self.question}" if self.question != "decoded" else "")


IDENTITY = ("method", "budget", "prefill", "question", "task", "length", "depth", "position", "what")


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score (https://doi.org/10.2307/2276774).

    >>> [round(edge, 4) for edge in wilson(45, 50)]
    [0.7864, 0.9565]
    """
    share, square = right / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / total + square / 4 / total)
    return max(0.0, middle - half), min(1.0, middle + half)


def written(value: Any) -> str:
    """Format a cell of a CSV: four digits for a float, and nothing for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


class Table:
    """A CSV that is rewritten whenever rows are added. Rows of an earlier run stay unless they are measured again."""

    def __init__(self, path: Path, kind: type[Any] = Row) -> None:
        self.path, self.columns = path, [field.name for field in fields(kind)]
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self._keep(csv.DictReader(file))

    def add(self, rows: Iterable[Any]) -> None:
        """Add rows, and write the file. A process that is killed meanwhile leaves the old file."""
        self._keep({name: written(value) for name, value in asdict(row).items()} for row in rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        with new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows.values())
        new.replace(self.path)

    def _keep(self, rows: Iterable[dict[str, str]]) -> None:
        for row in rows:
            self.rows[tuple(row.get(name, "") for name in IDENTITY)] = row
