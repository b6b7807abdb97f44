"""What becomes of an attention call that is not rewritten, and of a graph that cannot run."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class Left:
    """An attention call that stays as it is, and why."""

    node: Node
    reason: str


class Refused(Exception):
    """A graph cannot run as its user wants. ``error`` is raised when it runs: while compiling, torch would wrap it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error
