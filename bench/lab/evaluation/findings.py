"""Summarize what the rows say about heads in ``quality-heads.csv``: one line per claim about gates, echo and chance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.lab.evaluation.methods import QUARTER
from bench.lab.evaluation.rows import Table
from bench.measure.report import read
from sparse_compile.head_profile import Profile


@dataclass(frozen=True)
class Finding:
    """A number, the bar that it has to reach (``bar`` says from which side), and whether it does."""

    what: str
    value: float
    bar: str
    holds: str
    note: str


def found(out: Path, gates: Profile, echo: Profile, *, needles: tuple[str, ...], length: int) -> Iterator[Finding]:
    """Yield the findings from ``quality.csv`` in ``out`` and from the profiles.

    Without rows of full attention there are none. Without rows of gates or echo, their comparison with full attention is left
    out. A mean without rows is NaN.
    """
    at = {
        (row["method"], row["prefill"], row["task"]): 100 * float(row["accuracy"])
        for row in read(out, "quality")
        if int(row["length"]) == length and row["question"] == "decoded" and not _has_budget(row)
    }

    def accuracies(method: str, prefill: str = "strict") -> list[float]:
        return [at[method, prefill, task] for task in needles if (method, prefill, task) in at]

    def mean(names: list[str]) -> float:
        every = [sum(values) / len(values) for name in names if (values := accuracies(name))]
        return sum(every) / len(every) if every else float("nan")

    full = accuracies("full")
    if not full:
        return
    yield _held("full attention, single needle, %", full[0], ">=", 98)
    for name in ("gates", "echo"):
        for prefill in ("strict", "chunk_relaxed"):
            values = accuracies(f"{name}, a quarter of the heads", prefill)
            if values:
                worst, task = max(zip((a - b for a, b in zip(full, values, strict=True)), needles, strict=True))
                yield _held(f"{name}, a quarter of the heads, {prefill}: most points below full", worst, "<=", 2, task)
    names = sorted({name for name, *_ in at})
    random = [name for name in names if name.startswith("random") and name.endswith("a quarter of the heads")]
    less = mean(["full"]) - mean(random)
    yield _held(f"random heads, a quarter, mean of {len(random)} seeds: points below full", less, ">=", 20)
    for name in ("gates", "echo"):
        yield _told(f"needles without the best quarter of the heads by {name}, %", mean([f"without the best heads by {name}"]))
    others = [name for name in names if name.startswith("without other heads")]
    yield _told(f"needles without as many others, mean of {len(others)} seeds, %", mean(others))
    yield _told("needles without the last quarter of the heads by gates, %", mean(["without the last heads by gates"]))
    yield _told("needles, full, %", mean(["full"]))
    yield from _profiles(gates, echo)


def _profiles(gates: Profile, echo: Profile) -> Iterator[Finding]:
    opened = _opened(gates)
    if opened:
        what = f"heads with gates above 0.5 ({len(opened)}, at penalty {gates.numbers.get('penalty')}) among as many by echo"
        every = [_shared(opened, Profile(scores)) for scores in echo.numbers.get("by_seed", [echo.scores])]
        yield _held(f"{what}, mean of {len(every)} seeds, %", sum(every) / len(every), ">=", 80)
        yield _told(f"{what}, seed {echo.numbers.get('seed')}, %", _shared(opened, echo))
    best = _places(gates.heads(QUARTER).full)
    yield _told("the best quarter by gates that is in the best quarter by echo, %", _shared(best, echo))
    yield _held("echo on the CPU, s", float(echo.numbers.get("seconds", "nan")), "<", 60)
    for name in ("noise", "text"):
        yield _told(f"sink rate on {name}, %", 100 * float(echo.numbers.get(f"sink_rate_{name}", "nan")))


def published(gates: Profile, echo: Profile) -> Iterator[Finding]:
    """Yield the comparison with echo for gates trained under the published penalty, most of which stay open."""
    opened = _opened(gates)
    what = f"heads with gates above 0.5 ({len(opened)}, at penalty {gates.numbers.get('penalty')}) among as many by echo, %"
    if opened:
        yield _told(what, _shared(opened, echo))


def _opened(gates: Profile) -> set[tuple[int, int]]:
    return {(layer, head) for layer, row in enumerate(gates.scores) for head, gate in enumerate(row) if gate > 0.5}


def _shared(heads: set[tuple[int, int]], echo: Profile) -> float:
    """Return the share of ``heads``, in %, that are among the equally many best heads of ``echo``."""
    as_many = _places(echo.heads(len(heads) / (len(echo.scores) * len(echo.scores[0]))).full)
    return 100 * len(heads & as_many) / len(heads)


def _places(full: tuple[tuple[bool, ...], ...]) -> set[tuple[int, int]]:
    return {(layer, head) for layer, row in enumerate(full) for head, is_full in enumerate(row) if is_full}


def _held(what: str, value: float, way: str, bar: float, note: str = "") -> Finding:
    holds = {">=": value >= bar, "<=": value <= bar, "<": value < bar}[way]
    return Finding(what, value, f"{way} {bar:g}", "yes" if holds else "no", note)


def _told(what: str, value: float) -> Finding:
    return Finding(what, value, "", "", "")


def _has_budget(row: dict[str, str]) -> bool:
    return bool(row["budget"]) and row["budget"] != "1"


def write(out: Path, findings: Iterator[Finding]) -> None:
    """Write ``quality-heads.csv`` anew, and print it."""
    path = out / "quality-heads.csv"
    rows = list(findings)
    path.unlink(missing_ok=True)
    Table(path, Finding).add(rows)
    for row in rows:
        print(f"{row.what}: {row.value:.4g} {row.bar and f'({row.bar}: {row.holds})'} {row.note}".rstrip())
