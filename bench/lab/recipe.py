"""Settings of a training run: lengths, learning rates and sizes."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How long a training runs, on which lengths, and how often it is evaluated."""

    steps: int = 8000
    tokens: int = 1 << 16  # tokens of a step
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)  # training begins with the first alone; the last joins in the last third
    rate: float = 1.5e-3
    warm_up: int = 300
    look_every: int = 500
    looked_at: tuple[int, ...] = (1024, 2048)  # lengths evaluated every ``look_every`` steps
    items: int = 256  # items of a task in these evaluations
    save_every: int = 1000
    scored: tuple[int, ...] = (512, 1024, 2048)  # lengths evaluated at the end
    scored_items: int = 1000
    layers: int = 6
    hidden: int = 256
    mixtures: tuple[tuple[float, str], ...] = ((2 / 9, "early"), (1.0, "late"))  # share of the training at which each ends
    growing: bool = True  # whether lengths grow from the first alone to all

    def mixture(self, step: int) -> str:
        """Return the name of the task mixture of a step."""
        return next(name for until, name in self.mixtures if step < until * self.steps)

    def length(self, step: int, chance: random.Random) -> int:
        """Draw one of the lengths of this part of the training. Longer ones are more likely."""
        part = step / self.steps if self.growing else 1.0
        count = 1 if part < 1 / 6 else max(1, len(self.lengths) - 1) if part < 2 / 3 else len(self.lengths)
        return chance.choices(self.lengths[:count], range(1, count + 1))[0]

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step: a linear rise, then a linear fall to zero."""
        return self.rate * min((step + 1) / self.warm_up, (self.steps - step) / max(1, self.steps - self.warm_up))


# Continues from a trained model.
SECOND = Recipe(
    steps=2500, rate=7e-4, warm_up=100, lengths=(512, 1024, 2048), look_every=1250, mixtures=((1.0, "hard"),), growing=False
)
SMOKE = Recipe(
    steps=8, tokens=1024, lengths=(128,), warm_up=2, look_every=4, looked_at=(128,), items=4, save_every=4, scored=(128,),
    scored_items=8, layers=2, hidden=64,
)  # fmt: skip
