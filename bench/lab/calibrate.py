"""Find the small model's retrieval heads: ``python -m bench.lab.calibrate --out DIR`` writes gates.json and echo.json."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.lab.data.haystack import Text, library_text, noise, repository_text
from bench.lab.data.items import filled
from bench.lab.data.tasks import Needles
from bench.lab.evaluation.budgets import SINK
from bench.lab.evaluation.methods import RECENT
from bench.lab.model import CHECKPOINT, build, config, load
from sparse_compile.calibration import echo_profile, observe, train_gates
from sparse_compile.calibration.gate_training import PENALTY
from sparse_compile.head_profile import Profile

SEED = 1 << 34  # no training, scoring or bench uses it
ECHO_SEEDS = 6
# Ten times the published penalty. Under the published one, 16 of the 24 gates stay above a half: every head that affects the
# last hidden states keeps its gate open, whether answers need it or not.
SHARP = 10 * PENALTY


@dataclass(frozen=True, eq=False)
class Asked:
    """Training data for gates: ``asked(step)`` returns items of one needle task, hidden in noise or in text.

    A mask comes with them, which is true at the tokens that predict a token of an answer.
    """

    text: Text
    device: torch.device
    lengths: tuple[int, ...] = (512, 1024, 1536, 2048)
    tokens: int = 1 << 15  # tokens of a step
    seed: int = 0

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = torch.Generator(self.device).manual_seed(SEED + 1_000_003 * self.seed + step)
        haystack = noise if step % 2 else self.text
        tasks = (
            Needles("single", 1, 1, haystack=haystack),
            Needles("multi", 4, 4, haystack=haystack),
            Needles("multi_key", 16, 1, haystack=haystack),
            Needles("multi_query", 8, 2, together=True, haystack=haystack),
            Needles("turns", 8, 5, haystack=haystack),
        )
        length = self.lengths[step // 2 % len(self.lengths)]
        items = tasks[step % len(tasks)].make(max(1, self.tokens // length), length, rng)
        return items.tokens(), items.asked().roll(-1, 1)  # the token before predicts; the first is no answer


def gates(model: Any, *, steps: int, data: Asked, penalty: float) -> Profile:
    """Train gates on needles. The profile also records how long that took."""
    began = time.perf_counter()
    profile = train_gates(model, data, steps=steps, sink=SINK, recent=RECENT, penalty=penalty, inner="eager")
    numbers = {**profile.numbers, "seed": data.seed, "seconds": _since(began), "device": str(model.device)}
    return replace(profile, numbers=numbers)


def echo(model: Any, *, period: int | None, length: int = 2048) -> Profile:
    """Find echo heads without data.

    The profile also records how long that took, and the sink rate of the model on noise and on text. ``by_seed`` holds the
    scores from ``ECHO_SEEDS`` seeds of random tokens, the default seed first. The model moves to the CPU.
    """
    model.cpu()
    began = time.perf_counter()
    profile = echo_profile(model, period=period, inner="eager")
    numbers = {**profile.numbers, "seconds": _since(began), "device": f"CPU, {torch.get_num_threads()} threads"}
    others = (echo_profile(model, period=period, seed=seed, inner="eager") for seed in range(1, ECHO_SEEDS))
    numbers["by_seed"] = [profile.scores, *(other.scores for other in others)]
    rng = torch.Generator().manual_seed(SEED)
    for name, haystack in (("noise", noise), ("text", repository_text())):
        seen = observe(model, filled(haystack, 4, length, rng), sink=SINK, recent=RECENT, inner="eager")
        numbers |= {f"sink_rate_{name}": seen.sink_rate(), f"rates_{name}": seen.rate}
    return replace(profile, numbers=numbers)


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 1)


def main() -> None:
    """Write both profiles of a checkpoint."""
    parser = argparse.ArgumentParser(prog="bench.lab.calibrate", description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for the profiles")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--penalty", type=float, default=SHARP, help=f"penalty for a mean gate of 1 (default: {SHARP})")
    parser.add_argument("--period", type=int, help="random tokens before echo repeats them (default: the library's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="run a tiny model with random weights for a few steps on the CPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.smoke else "cpu")
    model: Any = build(0, config(layers=2, hidden=64)).eval() if arguments.smoke else load(arguments.model)
    sizes: dict[str, Any] = {"lengths": (192,), "tokens": 768} if arguments.smoke else {}
    data = Asked(library_text(1 << 20).to(device), device, seed=arguments.seed, **sizes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    profiles = [
        gates(model.to(device), steps=2 if arguments.smoke else arguments.steps, data=data, penalty=arguments.penalty),
        echo(model, period=64 if arguments.smoke else arguments.period, length=192 if arguments.smoke else 2048),
    ]
    for profile in profiles:
        profile.save(arguments.out / f"{profile.method}.json")
        print(f"{profile.method}, {profile.numbers['seconds']} s:")
        for row in profile.scores:
            print("  " + " ".join(f"{score:.3f}" for score in row))


if __name__ == "__main__":
    main()
