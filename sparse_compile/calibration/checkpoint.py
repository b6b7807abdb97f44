"""The file from which an interrupted training of gates continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

STEPS, SECONDS = 100, 60.0  # a file is written after so many steps, or after so much time
HASHES = {"weights": "a hash of the weights", "data": "a hash of the texts, their lengths and their seed"}


class Checkpoint:
    """The training state that a file stores. ``run`` identifies the run: a file of any other one is refused."""

    def __init__(
        self,
        gates: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        run: Mapping[str, Any],
        path: Path | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gates, self.optimizer, self.schedule, self.run, self.path = gates, optimizer, schedule, run, path
        self.clock, self._saved = clock, clock()

    def load(self) -> tuple[int, float]:
        """Return the step to continue with, and the loss of the step before it."""
        if self.path is None:
            return 0, 0.0
        if not self.path.parent.is_dir():
            raise ValueError(f"training writes {self.path}, but its folder does not exist: create the folder")
        if not self.path.exists():
            return 0, 0.0
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            run, shapes = dict(found["settings"]), [list(gate.shape) for gate in found["gates"]]
        except (RuntimeError, EOFError, UnpicklingError, LookupError, TypeError, ValueError) as wrong:
            raise ValueError(f"{self.path} was not written by train_gates: pass another file, or remove this one") from wrong
        theirs = _flat(run | {"gates": shapes})
        ours = _flat({**self.run, "gates": [list(gate.shape) for gate in self.gates]})
        if theirs != ours:
            names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
            if len(names) > 1:  # the shapes of gates follow from the model
                names = [name for name in names if name != "gates"]
            old, new = (", ".join(_told(name, values) for name in names) for values in (theirs, ours))
            raise ValueError(
                f"{self.path} belongs to a run with {old}, but this run has {new}: pass another file, or remove this one"
            )
        with torch.no_grad():
            for gate, kept in zip(self.gates, found["gates"], strict=True):
                gate.copy_(kept)
        self.optimizer.load_state_dict(found["optimizer"])
        self.schedule.load_state_dict(found["schedule"])
        return int(found["step"]), float(found["loss"])

    def save(self, step: int, loss: float, *, last: bool) -> None:
        """Replace the file atomically after the ``last`` step, every 100 steps, and when a minute has passed."""
        if self.path is None or not (last or step % STEPS == 0 or self.clock() - self._saved >= SECONDS):
            return
        content: dict[str, Any] = {"step": step, "loss": loss, "settings": dict(self.run)}
        content |= {"gates": [gate.detach().cpu() for gate in self.gates]}
        content |= {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        new = self.path.with_name(self.path.name + ".new")
        torch.save(content, new)
        new.replace(self.path)
        self._saved = self.clock()


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """The values that identify a run by name, and those of a group by its name and theirs, such as ``model layers``."""
    flat: dict[str, Any] = {}
    for name, value in run.items():
        flat |= {f"{name} {key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _told(name: str, values: Mapping[str, Any]) -> str:
    if name not in values:
        return f"no {name}"
    return f"{name}={values[name]!r}" + (f" ({HASHES[name]})" if name in HASHES else "")
