"""The operations that a model applies to attention scores before the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from torch.fx import Node


@dataclass(frozen=True)
class Scale:
    """Scores times a number."""

    factor: float


@dataclass(frozen=True)
class ScaleBy:
    """Scores times a tensor of the graph."""

    node: Node


@dataclass(frozen=True)
class Clamp:
    """Scores cut off below ``low`` and above ``high``."""

    low: float
    high: float


@dataclass(frozen=True)
class Tanh:
    """The hyperbolic tangent of the scores."""


@dataclass(frozen=True)
class Add:
    """Scores plus a tensor of the graph."""

    node: Node


@dataclass(frozen=True)
class Hide:
    """Scores replaced by a large negative number where a bool tensor is true (with ``unless``, where it is false)."""

    node: Node
    unless: bool = False
    fill: float = -inf


Step = Scale | ScaleBy | Clamp | Tanh | Add | Hide
