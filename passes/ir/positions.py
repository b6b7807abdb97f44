"""The text positions of the queries and keys of a call."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch.fx import Node


@dataclass(frozen=True)
class Positions:
    """Query ``i`` of a call has text position ``q_start + q_shift + i``, and key ``j`` has ``kv_start + j``.

    The starts are expressions of the graph's shapes. ``q_shift`` is a 0-d integer tensor of the graph, or None for 0.
    """

    q_start: sympy.Expr = sympy.S.Zero
    kv_start: sympy.Expr = sympy.S.Zero
    q_shift: Node | None = None

    def __str__(self) -> str:
        shift = f" + {self.q_shift.name}" if self.q_shift is not None else ""
        return f"queries from {self.q_start}{shift}, keys from {self.kv_start}"
