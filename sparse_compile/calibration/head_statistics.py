"""Measure the attention of every head in one forward pass, and find the heads that attend to repeated tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_compile.calibration.forward import Hidden, compiled_hidden, frozen, last_hidden, positions_of, sizes_of
from sparse_compile.calibration.progress import Line, duration, ticking
from sparse_compile.dynamo import Backend, Hooks
from sparse_compile.head_profile import Profile, signature

if TYPE_CHECKING:
    from sparse_compile.passes.ops.attention_stats import Look

PERIOD, REPEATS = 2500, 4  # the number of random tokens, and of their repeats, as published


@dataclass(frozen=True)
class Observations:
    """Statistics of each head's attention, averaged over queries, ``[layers][query heads]``. NaN marks one not measured.

    | field       | mean over queries                                                              |
    |-------------|--------------------------------------------------------------------------------|
    | `sink`      | attention mass on the first keys, for queries that see more than sink + recent |
    | `recent`    | mass on the last keys, for the same queries                                    |
    | `entropy`   | entropy of the attention weights, in nats                                      |
    | `rate`      | mass on the very first key, for the first 64 queries                           |
    | `echo`      | mass on earlier copies of the query's token                                    |
    | `induction` | mass on the tokens that followed those copies                                  |
    | `pages`     | mass on each page of 64 keys, ``[layers][query heads][pages]``                 |
    """

    sink: list[list[float]]
    recent: list[list[float]]
    entropy: list[list[float]]
    rate: list[list[float]]
    echo: list[list[float]]
    induction: list[list[float]]
    pages: list[list[list[float]]] = field(repr=False)

    def sink_rate(self, threshold: float = 0.3) -> float:
        """The share of heads whose ``rate`` exceeds ``threshold`` (https://arxiv.org/abs/2410.10781)."""
        heads = [mass for row in self.rate for mass in row]
        return sum(mass > threshold for mass in heads) / len(heads)

    def by_kv_head(self, name: str, kv_heads: int) -> list[list[float]]:
        """A statistic for each KV head: the maximum over the query heads that share it."""
        rows: list[list[float]] = getattr(self, name)
        group = len(rows[0]) // kv_heads
        return [[max(row[at * group : (at + 1) * group]) for at in range(kv_heads)] for row in rows]


def observe(
    model: nn.Module,
    tokens: Tensor,
    *,
    period: int = 0,
    start: int = 0,
    sink: int = 4,
    recent: int = 64,
    inner: str = "inductor",
    progress: bool = True,
    hidden: Hidden = last_hidden,
) -> Observations:
    """Measure the attention of every head of ``model`` in one forward pass over ``tokens`` ``[B, N]``.

    From token ``start`` on, the text repeats itself every ``period`` tokens. If ``period`` is 0, ``echo`` and ``induction``
    are NaN. Memory grows linearly with N, not quadratically. With ``progress``, a line on stderr says how far the pass is.

        >>> seen = observe(model, torch.randint(64, (1, 32)).repeat(1, 2), period=32, recent=8, inner="eager")
        >>> len(seen.echo), len(seen.echo[0])
        (2, 4)

    Raises ``ValueError`` for a model without config, with layers whose attention was not recognized, or with attention that
    reads more than queries, keys and positions. Also raises it for a period of 1 and a negative period or start.
    """
    from sparse_compile.passes.calibration.observe_heads import watch_attention
    from sparse_compile.passes.ops.attention_stats import Look

    if period < 0 or period == 1 or start < 0:
        raise ValueError(
            f"observe needs period >= 2, or 0 for a text that does not repeat, and start >= 0, got {period} and {start}"
        )
    config = signature(sizes_of(model))
    device = next(model.parameters()).device
    sums = _Sums(config["layers"], Look(sink, recent, period=period, start=start), device)
    backend = Backend(inner=inner, hooks=Hooks((partial(watch_attention, look=sums.look, sums=sums),)))
    line = Line(progress)
    with frozen(model), torch.no_grad(), ticking(Layers(sums, tokens.numel(), line.clock).text, line):
        compiled_hidden(model, hidden, backend)(tokens.to(device))
    return sums.means()


def echo_profile(
    model: nn.Module,
    *,
    period: int | None = None,
    repeats: int = REPEATS,
    batch: int = 1,
    seed: int = 0,
    inner: str = "inductor",
    progress: bool = True,
    hidden: Hidden = last_hidden,
) -> Profile:
    """Score KV heads by their attention to repeated random tokens, without data (https://arxiv.org/abs/2407.15891).

    The score of a query head is the larger of its induction and echo mass, and that of a KV head is the maximum over its query
    heads. ``numbers`` holds both masses. ``period`` defaults to 2,500 tokens, or to fewer so that all repeats fill half of the
    model's positions. The text begins with the config's ``bos_token_id`` if there is one: without it a model may lack its
    attention sink and attend differently than usual. The paper keeps the 14 % of heads with the highest induction scores and
    the 1 % with the highest echo scores.

        >>> echo_profile(model, period=16, inner="eager").method
        'echo'

    Raises ``ValueError`` for fewer than two tokens or repeats, and where ``observe`` does.
    """
    config = sizes_of(model)
    if period is None:
        half = (positions_of(config) or 2 * PERIOD * repeats) // 2
        period = max(2, min(PERIOD, half // max(1, repeats)))
    if period < 2 or repeats < 2:
        raise ValueError(f"echo_profile needs period >= 2 and repeats >= 2, got {period} and {repeats}")
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (batch, period), generator=rng).repeat(1, repeats)
    begins = isinstance(getattr(config, "bos_token_id", None), int)
    if begins:  # ``start`` excludes this token, which is not repeated
        tokens = torch.cat([torch.full((batch, 1), config.bos_token_id), tokens], dim=1)
    seen = observe(model, tokens, period=period, start=int(begins), inner=inner, progress=progress, hidden=hidden)
    found = signature(config)
    echo, induction = (seen.by_kv_head(name, found["kv_heads"]) for name in ("echo", "induction"))
    scores = [[max(pair) for pair in zip(*rows, strict=True)] for rows in zip(echo, induction, strict=True)]
    numbers: dict[str, Any] = {"echo": echo, "induction": induction, "sink_rate": seen.sink_rate(), "period": period}
    return Profile(scores, method="echo", model=found, numbers=numbers | {"repeats": repeats, "seed": seed})


class _Sums:
    """The sums of each layer, to which the compiled graphs add."""

    def __init__(self, layers: int, look: Look, device: torch.device) -> None:
        self.layers, self.look, self.device = layers, look, device
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, heads: int, keys: int) -> tuple[Tensor, Tensor]:
        from sparse_compile.passes.ops.attention_stats import STATISTICS

        if layer in self.found or layer >= self.layers:
            raise ValueError(
                f"layer {layer} attends twice, or is not one of the {self.layers} layers: each layer needs one attention call"
            )
        make = partial(torch.zeros, dtype=torch.float64, device=self.device)
        self.found[layer] = make(heads, len(STATISTICS), 2), make(heads, -(-keys // self.look.page), 2)
        return self.found[layer]

    def done(self) -> list[float] | None:
        """The number of queries that each layer has measured so far; None on a GPU, where looking would wait for it."""
        from sparse_compile.passes.ops.attention_stats import STATISTICS

        if self.device.type != "cpu":
            return None
        counted = STATISTICS.index("entropy")  # it counts every query
        return [float(totals[0, counted, 1]) for totals, _ in list(self.found.values())]

    def means(self) -> Observations:
        from sparse_compile.passes.ops.attention_stats import STATISTICS

        missing = sorted(set(range(self.layers)) - set(self.found))
        if missing:
            raise ValueError(
                f"layers {missing} have no causal attention that was recognized: call explain(model, ...) to see why"
            )
        rows = [self.found[layer] for layer in range(self.layers)]
        totals = [_mean(totals) for totals, _ in rows]
        named = {name: [row[:, at].tolist() for row in totals] for at, name in enumerate(STATISTICS)}
        return Observations(**named, pages=[_mean(pages).tolist() for _, pages in rows])


class Layers:
    """What is known of a pass over all layers, which the sums of the layers show while it runs."""

    def __init__(self, sums: _Sums, queries: int, clock: Callable[[], float]) -> None:
        self.sums, self.queries, self.clock = sums, queries, clock
        self._began, self._first = clock(), 0.0  # when the pass began, and when the first layer was seen to run

    def text(self) -> str:
        """The line that shows how far the pass is."""
        now, done = self.clock(), self.sums.done()
        passed = duration(now - self._began)
        if done is None:
            return f"one pass over {self.queries:,} tokens, {passed}"
        layers = sum(queries / self.queries for queries in done)
        if not layers:
            return f"one pass over {self.queries:,} tokens, compiling, {passed}"
        self._first = self._first or now
        left = (now - self._first) / layers * (self.sums.layers - layers)
        told = f"{layers:.1f} of {self.sums.layers} layers are done, {passed}"
        return f"{told}, about {duration(left)} left" if now > self._first and left else told


def _mean(sums: Tensor) -> Tensor:
    return sums[..., 0] / sums[..., 1]
