"""The report of a backend: one row for every attention call of every graph."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from sparse_compile.masks import Mask
from sparse_compile.masks.density import largest_density

NOT_IN_JSON = ("mask", "traced", "block", "refused", "policy_shares")

Action = Literal["exact", "sparse", "left"]


@dataclass(frozen=True)
class Site:
    """One attention call of one compiled graph.

    ``module`` is the path of the module that makes the call, and ``layer`` is the first number in it. ``q_len`` and ``kv_len``
    are text: numbers, or symbols for dynamic lengths. ``model_mask`` is the mask that was recovered from the model, and
    ``policy_mask`` is the mask that the policy adds. ``policy_shares`` says instead how many heads have each mask, such as
    ``3 of 8 KV heads causal; 5 of 8 causal & sliding_window(64)``, and stands in the table. ``action`` is ``exact`` (rewritten
    with the same result), ``sparse`` (a policy removed keys) or ``left`` (not changed). ``reason`` says why a call was left,
    runs a slower kernel, or runs without its policy. ``kv_nbytes`` are the resident bytes of the layer in a ``SparseCache``,
    and ``kv_head_nbytes`` those of each KV head. ``kv_dense_nbytes`` are the bytes of a dense cache of the same ``kv_tokens``
    tokens, all rows together. The bytes are None (empty for heads) without a ``SparseCache``.
    """

    module: str
    layer: int | None
    phase: str
    q_len: str
    kv_len: str
    model_mask: str
    policy_mask: str
    kernel: str
    action: Action
    reason: str
    graph: int
    policy_shares: str = ""
    score_mod: str = ""
    heads: int = 1
    kv_heads: int = 1
    traced: tuple[int, int, int] = (0, 0, 0)  # q_len, kv_len and position of the first query in the traced example
    kv_nbytes: int | None = None
    kv_head_nbytes: tuple[int, ...] = ()
    kv_dense_nbytes: int | None = None
    kv_tokens: int = 0
    refused: tuple[tuple[str, str], ...] = ()  # each faster kernel, with the reason why it does not run
    block: tuple[int, int] = (1, 1)  # queries that select keys together, and keys in a page
    mask: Mask | None = field(default=None, compare=False, repr=False)

    @cached_property
    def density(self) -> float | None:
        """Visible pairs divided by all pairs at the traced lengths; None for calls that were left.

        A prefill over a ``SparseCache`` starts after the tokens that the cache held when it was traced, and all slots of the
        cache count as keys. A decode step counts as one over a full cache.

        Padding and other tensors that are known only at run time count as fully visible. A page_topk counts with its full
        budget.
        """
        if self.mask is None:
            return None
        q_len, kv_len, start = self.traced
        return largest_density(self.mask, q_len, kv_len, start, self.heads, self.block)

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        content = {k: v for k, v in asdict(self).items() if k not in NOT_IN_JSON}
        lengths = {"traced_q_len": self.traced[0], "traced_kv_len": self.traced[1]}
        refused = [{"kernel": kernel, "reason": reason} for kernel, reason in self.refused]
        return {**content, "density": self.density, **lengths, "refused": refused}


@dataclass(frozen=True)
class Engines:
    """What became of one compiled graph under ``inner="tensorrt"``.

    ``count`` is the number of its TensorRT engines. ``in_torch`` has the name of each op that runs in torch beside them, and
    how often it runs. It is empty for a graph without engines, which runs in torch as a whole.
    """

    graph: int
    count: int
    in_torch: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        if not self.count:
            return f"graph {self.graph}: no TensorRT engine, so the whole graph runs in torch"
        ops = ", ".join(f"{times} {op}" for op, times in self.in_torch)
        return f"graph {self.graph}: {self.count} TensorRT engine{'s' * (self.count != 1)}; in torch: {ops or 'nothing'}"


@dataclass
class Report:
    """Every attention call of every graph that a backend compiled, and how often it compiled.

    ``compiles`` counts graphs, and ``recompiles`` counts those that compile the same code again, as a decode step after a
    prefill does, or a prompt of a new length.
    ``str(report)`` is a table in which equal rows of several layers share a line, also if their heads have the same masks in
    another order. ``sites`` has one row for each call, and ``to_json`` has the mask of each head. ``engines`` has one row for
    each graph under ``inner="tensorrt"``.
    """

    sites: list[Site] = field(default_factory=list)
    compiles: int = 0
    recompiles: int = 0
    notes: list[str] = field(default_factory=list)
    engines: list[Engines] = field(default_factory=list)

    @property
    def rewritten(self) -> list[Site]:
        """The calls that were rewritten."""
        return [site for site in self.sites if site.action != "left"]

    @property
    def left(self) -> list[Site]:
        """The calls that stay as they are."""
        return [site for site in self.sites if site.action == "left"]

    def why(self, site: Site) -> str:
        """Say which kernel runs an attention call, and why each faster kernel does not, with one line for each."""
        where = f"{site.module or '(top)'}, {site.phase}"
        if site.action == "left":
            return f"{where}: left as it is, because {site.reason}"
        lines = [f"{where}: {site.kernel}{f' ({site.reason})' if site.reason else ''}"]
        return "\n".join([*lines, *(f"  not {kernel}: {reason}" for kernel, reason in site.refused)])

    def to_json(self) -> str:
        """Return the whole report as JSON text."""
        content = {
            "compiles": self.compiles,
            "recompiles": self.recompiles,
            "notes": self.notes,
            "sites": [site.as_dict() for site in self.sites],
            "engines": [{"graph": row.graph, "count": row.count, "in_torch": dict(row.in_torch)} for row in self.engines],
        }
        return json.dumps(content, indent=1)

    def __str__(self) -> str:
        calls = f"{len(self.rewritten)} of {len(self.sites)} attention calls rewritten"
        lines = [f"sparse_compile: {calls}; {_graphs(self.compiles, self.sites)}"]
        rows = [_cells(site, count, layers) for site, count, layers in _merged(self.sites)]
        if rows:
            head = ("graph", "module", "calls", "phase", "q x kv", "model mask", "policy", "density", "kernel")
            lines += _table([head, *[row[:-1] for row in rows]])
            lines += _reasons(self.sites)
        cached = {site.module: site for site in self.sites if site.kv_nbytes is not None}
        if cached:
            held, dense = (sum(getattr(site, name) for site in cached.values()) for name in ("kv_nbytes", "kv_dense_nbytes"))
            tokens = max(site.kv_tokens for site in cached.values())
            each = f"{held / tokens:,.0f} bytes for each of {tokens:,} tokens, {held / dense:.2f} of dense"
            lines.append(f"  SparseCache: {held / 2**20:.1f} MiB of keys and values, dense {dense / 2**20:.1f} MiB; {each}")
        lines += [f"  {row}" for row in self.engines]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _graphs(compiles: int, sites: list[Site]) -> str:
    """Count the graphs, and if there are several, say what each is for: ``2 graphs compiled: 1 prefill, 1 decode``."""
    phases: dict[int, dict[str, None]] = {}
    for site in sites:
        phases.setdefault(site.graph, {})[site.phase] = None
    kinds = Counter(" and ".join(found) for found in phases.values())
    if compiles > len(phases):
        kinds["without attention"] = compiles - len(phases)
    told = f": {', '.join(f'{count} {kind}' for kind, count in kinds.items())}" if compiles > 1 else ""
    return f"{compiles} graph{'s' * (compiles != 1)} compiled{told}"


def _merged(sites: list[Site]) -> list[tuple[Site, int, str]]:
    """Merge sites that differ only in their layer; returns the first, their number, and the module path with all layers."""
    groups: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        path = re.sub(r"\d+", "*", site.module, count=1)
        key = (site.graph, path, site.phase, site.q_len, site.kv_len, site.model_mask, site.policy_shares)
        groups.setdefault((*key, site.kernel, site.action, site.reason, site.score_mod, site.traced), []).append(site)
    merged = []
    for members in groups.values():
        layers = sorted({site.layer for site in members if site.layer is not None})
        path = members[0].module
        if len(layers) > 1:
            path = re.sub(r"\d+", f"[{_ranges(layers)}]", path, count=1)
        merged.append((members[0], len(members), path))
    return merged


def _reasons(sites: list[Site]) -> list[str]:
    """List every reason once, with its graphs and the number of its calls."""
    by_reason: dict[str, list[Site]] = {}
    for site in sites:
        if site.reason:
            by_reason.setdefault(site.reason, []).append(site)
    return [
        f"  graph {_ranges(sorted({site.graph for site in members}))}, {len(members)} calls: {reason}"
        for reason, members in by_reason.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """Sorted integers as text: ``0-3,5``."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _cells(site: Site, count: int, path: str) -> tuple[str, ...]:
    density = "" if site.density is None else f"{100 * site.density:.3g} %"
    mask = site.model_mask + (f", {site.score_mod}" if site.score_mod else "")
    lengths = f"{site.q_len} x {site.kv_len}"
    kernel = site.kernel if site.action != "left" else "left as it is"
    return (
        str(site.graph),
        path or "(top)",
        str(count),
        site.phase,
        lengths,
        mask,
        site.policy_shares,
        density,
        kernel,
        site.reason,
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
