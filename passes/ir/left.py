"""An attention call that is not rewritten, and a graph that cannot run."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class Left:
    """An attention call that stays as it is, and the reason for the report."""

    node: Node
    reason: str


class Refused(Exception):
    """A graph cannot run as requested. ``error`` is raised when the graph runs, because torch would wrap it while compiling."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error
