"""Test the comparison with kvpress as far as it runs without kvpress: files of items and tables, and budgets."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.lab import kvpress_bench
from bench.lab.evaluation import presses
from bench.lab.evaluation.jobs import Cell, Size, made
from bench.lab.evaluation.rows import Table


def test_a_smoke_run_asks_our_side_and_writes_a_table(tmp_path: Path) -> None:
    size, gates = Size(None, items=2, seeds=2), [[0.5, 0.1], [0.9, 0.3]]
    kvpress_bench.write_items(tmp_path, gates, size, 160, ("single", "turns"))
    items, scores = kvpress_bench.read_items(tmp_path)
    assert scores == gates and list(items) == ["single", "turns"]
    assert all(torch.equal(items[task].tokens(), made(Cell(task, 160), size).tokens()) for task in items)
    assert torch.equal(items["turns"].asked(), made(Cell("turns", 160), size).asked())

    kvpress_bench.ours(tmp_path, size, budgets=())
    theirs = Table(tmp_path / "theirs.csv", kvpress_bench.Beside)
    row = ("SnapKV", "kvpress 0", 1 / 2, "single", "decoded", 160)
    theirs.add([kvpress_bench._row(row, torch.tensor([True, False]), 0.5, 0.5, "")])
    told = kvpress_bench.table(tmp_path, tmp_path)
    with (tmp_path / "kvpress.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["accuracy"]) for row in rows[:1]] == [("SnapKV", "0.5")]
    assert [(row["method"], row["task"], row["items"]) for row in rows[1:]] == [("full", "single", "4"), ("full", "turns", "4")]
    assert all(1 <= float(row["held"]) < 1.05 for row in rows[1:])
    assert "| SnapKV | decoded | 0.500 | 0.500 | 50.0% |" in told and told.count("\n") == 1 + 2


@pytest.mark.parametrize("budget", kvpress_bench.BUDGETS)
@pytest.mark.parametrize("begin", [480, 506, 508])
def test_what_presses_keep_and_what_follows_fit_the_budget(budget: float, begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Press:
        def __init__(self, ratio: float, *sizes: int) -> None:
            self.kept, self.ratio = int(begin * (1 - ratio)), ratio  # as kvpress rounds

    names = "StreamingLLMPress", "SnapKVPress", "KnormPress", "DuoAttentionPress"
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(**dict.fromkeys(names, Press)))
    *same, duo, prompt_alone = presses.presses(512, begin, torch.rand(6, 4).tolist(), budget)
    assert all(one.press.kept + 511 - begin == 512 * budget for one in same)
    full, recent = map(int, re.findall(r"(\d+) of 24 heads full, recent (\d+)", duo.note)[0])
    sizes = [511] * full + [presses.SINK + recent + 511 - begin] * (24 - full)
    assert recent >= 1 and budget * 0.98 < sum(sizes) / 24 / 512 <= budget
    assert sum(sizes) / 24 / 512 == pytest.approx(511 / 512 - duo.masked)
    assert prompt_alone.masked <= duo.masked
    assert duo.press.load_attention_pattern(None)[:2] == (presses.SINK, recent)
