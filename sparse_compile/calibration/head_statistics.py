"""What every head does with its attention, from one forward pass, and the heads that repeat what they have seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_compile.calibration.forward import Hidden, compiled_hidden, frozen, last_hidden, positions_of, sizes_of
from sparse_compile.dynamo import with_passes
from sparse_compile.head_profile import Profile, signature

if TYPE_CHECKING:
    from sparse_compile.passes.ops.attention_stats import Look

PERIOD, REPEATS = 2500, 4  # random tokens, and how often they come, as published


@dataclass(frozen=True)
class Observations:
    """Means over queries, ``[layers][query heads]`` each; what was not looked for is not a number.

    ``sink`` and ``recent`` are the mass on the first and last keys, of queries that see more than those. ``rate`` is the mass
    on the very first key of the first 64 queries. ``entropy`` is in nats. ``echo`` and ``induction`` are the mass on earlier
    copies of a token, and on what followed them. ``pages`` is the mass on each page of 64 keys, ``[layers][query
    heads][pages]``.
    """

    sink: list[list[float]]
    recent: list[list[float]]
    entropy: list[list[float]]
    rate: list[list[float]]
    echo: list[list[float]]
    induction: list[list[float]]
    pages: list[list[list[float]]] = field(repr=False)

    def sink_rate(self, threshold: float = 0.3) -> float:
        """The share of heads that give more than ``threshold`` to the first key (https://arxiv.org/abs/2410.10781)."""
        heads = [mass for row in self.rate for mass in row]
        return sum(mass > threshold for mass in heads) / len(heads)

    def by_kv_head(self, name: str, kv_heads: int) -> list[list[float]]:
        """A statistic for each KV head: the largest of the query heads that share it."""
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
    hidden: Hidden = last_hidden,
) -> Observations:
    """Watch every head of ``model`` read ``tokens`` ``[B, N]``, once.

    ``period`` says that the text repeats itself every so many tokens, from token ``start`` on; without, there is no ``echo``
    and no ``induction``. Memory grows with N, not with its square.

        >>> seen = observe(model, torch.randint(64, (1, 32)).repeat(1, 2), period=32, recent=8, inner="eager")
        >>> len(seen.echo), len(seen.echo[0])
        (2, 4)

    Raises ``ValueError`` for a model without config, with layers whose attention was not understood, or with attention that
    reads more than queries, keys and positions, and for a period of 1 or a negative start.
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
    backend = with_passes(partial(watch_attention, look=sums.look, sums=sums), inner=inner)
    with frozen(model), torch.no_grad():
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
    hidden: Hidden = last_hidden,
) -> Profile:
    """Which KV heads look for what they have seen, found without data: random tokens, repeated (https://arxiv.org/abs/2407.15891).

    A head's score is the larger of its induction and echo mass, that of a KV head the largest of its query heads; both are in
    ``numbers``. ``period`` of None is 2,500 tokens, or what fills half of the model's positions if that is fewer; the text
    begins with the config's ``bos_token_id``, without which a model may lack its sink and attend otherwise than it is used.
    The paper keeps the 14 % of heads with the highest induction and the 1 % with the highest echo scores.

        >>> echo_profile(model, period=16, inner="eager").method
        'echo'

    Raises as ``observe``.
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
    if begins:  # and is no copy of anything
        tokens = torch.cat([torch.full((batch, 1), config.bos_token_id), tokens], dim=1)
    seen = observe(model, tokens, period=period, start=int(begins), inner=inner, hidden=hidden)
    found = signature(config)
    echo, induction = (seen.by_kv_head(name, found["kv_heads"]) for name in ("echo", "induction"))
    scores = [[max(pair) for pair in zip(*rows, strict=True)] for rows in zip(echo, induction, strict=True)]
    numbers: dict[str, Any] = {"echo": echo, "induction": induction, "sink_rate": seen.sink_rate(), "period": period}
    return Profile(scores, method="echo", model=found, numbers=numbers | {"repeats": repeats, "seed": seed})


class _Sums:
    """What graphs add to, for each layer."""

    def __init__(self, layers: int, look: Look, device: torch.device) -> None:
        self.layers, self.look, self.device = layers, look, device
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, heads: int, keys: int) -> tuple[Tensor, Tensor]:
        from sparse_compile.passes.ops.attention_stats import STATISTICS

        if layer in self.found or layer >= self.layers:
            raise ValueError(f"layer {layer} attends twice, or is none of {self.layers}: heads are told apart by layer")
        make = partial(torch.zeros, dtype=torch.float64, device=self.device)
        self.found[layer] = make(heads, len(STATISTICS), 2), make(heads, -(-keys // self.look.page), 2)
        return self.found[layer]

    def means(self) -> Observations:
        from sparse_compile.passes.ops.attention_stats import STATISTICS

        missing = sorted(set(range(self.layers)) - set(self.found))
        if missing:
            raise ValueError(f"layers {missing} have no causal attention that was understood: ask explain(model, ...) why")
        rows = [self.found[layer] for layer in range(self.layers)]
        totals = [_mean(totals) for totals, _ in rows]
        named = {name: [row[:, at].tolist() for row in totals] for at, name in enumerate(STATISTICS)}
        return Observations(**named, pages=[_mean(pages).tolist() for _, pages in rows])


def _mean(sums: Tensor) -> Tensor:
    return sums[..., 0] / sums[..., 1]
