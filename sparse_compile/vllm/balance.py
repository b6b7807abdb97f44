"""Let KV heads change places, exactly, so that every rank of tensor parallelism has equally many heads of each kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.vllm.kinds import Kind

ATTENTION = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(.+)$")
ROWS = {"q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"}
NORMS = {"q_norm.weight", "k_norm.weight"}
COLUMNS = {"o_proj.weight"}
UNMOVED = {"o_proj.bias", "rotary_emb.inv_freq"}
NEEDED = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}


def balanced_order(layer: int, heads: Sequence[Kind], ranks: int) -> tuple[int, ...]:
    """Return an order of the KV heads of a layer in which each rank has equally many heads of every kind.

    Entry ``n`` is the head that takes place ``n``. Raises ``ValueError`` if the numbers of heads cannot be shared equally.
    """
    members: dict[Kind, list[int]] = {}
    for head, kind in enumerate(heads):
        members.setdefault(kind, []).append(head)
    for kind, own in members.items():
        if len(own) % ranks:
            raise ValueError(
                f"balance shares the heads of a kind equally, but layer {layer} has {len(own)} heads of kind {kind.name} for "
                f"{ranks} ranks: change the policy of this layer, or use --tensor-parallel-size 1"
            )
    dealt = [own[rank::ranks] for rank in range(ranks) for own in members.values()]
    return tuple(head for part in dealt for head in part)


@dataclass(frozen=True)
class HeadOrders:
    """The order of the KV heads of each layer, for a model whose query heads come in groups of ``group``."""

    orders: tuple[tuple[int, ...], ...]
    group: int
    head_size: int

    def moved(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights of a checkpoint, with the rows and columns of heads in their new places.

        Raises ``ValueError`` for attention weights of other names than those of Llama, whose heads cannot be told apart.
        """
        seen: dict[int, set[str]] = {layer: set() for layer, order in enumerate(self.orders) if order != tuple(sorted(order))}
        for name, weight in weights:
            found = ATTENTION.search(name)
            if found is None or int(found[1]) not in seen:
                yield name, weight
                continue
            seen[int(found[1])].add(found[2])
            yield name, self._moved(name, int(found[1]), found[2], weight)
        for layer, names in seen.items():
            if missing := sorted(NEEDED - names):
                raise ValueError(f"balance moves the heads of layer {layer}, but the weights have no {missing[0]}: {REMEDY}")

    def _moved(self, name: str, layer: int, part: str, weight: Tensor) -> Tensor:
        if part in UNMOVED or (part in NORMS and weight.numel() == self.head_size):
            return weight
        if part not in ROWS | COLUMNS | NORMS:
            raise ValueError(f"balance moves the heads of layer {layer}, but does not read {name}: {REMEDY}")
        repeat = self.group if part[0] in "qo" else 1
        heads = torch.tensor([head * repeat + query for head in self.orders[layer] for query in range(repeat)])
        index = (heads[:, None] * self.head_size + torch.arange(self.head_size)).flatten().to(weight.device)
        return weight.index_select(1 if part in COLUMNS else 0, index)


REMEDY = 'leave "balance" out, and use --tensor-parallel-size 1 or a policy with equally many heads of a kind on every rank'
