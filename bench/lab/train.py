"""Train the small model: ``python -m bench.lab.train --out DIR --seed 0`` takes some minutes on one H200."""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.lab.data.haystack import ROOT, Text, library_text, repository_text
from bench.lab.data.mixture import MIXTURES, mixed
from bench.lab.data.tasks import TASKS
from bench.lab.evaluation.score import accuracy, perplexity_by_position
from bench.lab.model import build, config, load, save, write_log
from bench.lab.recipe import SECOND, SMOKE, Recipe

Scores = dict[str, dict[int, float]]  # by task and length

EVALUATION = 1 << 32  # a seed that no training uses
BUCKET = 64  # tokens of each value of the perplexity by position


def train(recipe: Recipe, out: Path, *, seed: int, device: str, commit: str, start: Path | None = None) -> dict[str, Any]:
    """Train a model, write it and its log to ``out`` at intervals, and return the log.

    After SIGTERM, the training saves its current state and ends. ``start`` is the folder of a model to continue from; its log
    becomes part of this one.
    """
    began = time.perf_counter()
    model: Any = load(start) if start else build(seed, config(layers=recipe.layers, hidden=recipe.hidden))
    model.to(device)
    text = library_text()
    log = _described(model, recipe, text) | {"seed": seed, "commit": commit, "device": _device_name(device), "history": []}
    if start:
        log["before"] = json.loads((start / "log.json").read_text("utf-8"))
    with _termination() as is_terminated:
        for step, loss in _steps(model, recipe, text.to(device), seed):
            over = is_terminated() or step == recipe.steps
            if step % recipe.look_every == 0 or over:
                with torch.autocast(model.device.type, torch.bfloat16):
                    scores = scored(model, recipe.looked_at, recipe.items)
                log |= {"steps": step, "seconds": round(time.perf_counter() - began, 1)}
                log["history"].append({"step": step, "seconds": log["seconds"], "loss": float(loss), "scores": scores})
                print(_line(log["history"][-1]), flush=True)
            if step % recipe.save_every == 0 or over:
                save(model, out, log)
            if is_terminated():
                return log
    saved: Any = load(out)
    saved.to(device)
    log["scores"] = scored(saved, recipe.scored, recipe.scored_items)
    held_out = repository_text().to(device)
    log["perplexity"] = perplexity_by_position(saved, held_out, recipe.scored[-1], BUCKET).tolist()
    log["held_out_sha256"] = held_out.sha256
    log["seconds"] = round(time.perf_counter() - began, 1)
    write_log(out, log)
    return log


def _steps(model: Any, recipe: Recipe, text: Text, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Train, and yield after each step the number of steps done and the running mean of the loss."""
    device = model.device
    optimizer = _optimizer(model)
    chance, rng = random.Random(seed), torch.Generator(device).manual_seed(seed)
    loss_of: Callable[[Any, Tensor, Tensor], Tensor] = weighted_loss
    if device.type == "cuda":
        loss_of = torch.compile(weighted_loss, dynamic=False)  # a graph for each length
    mean = torch.zeros((), device=device)
    for step in range(recipe.steps):
        length = recipe.length(step, chance)
        shares = MIXTURES[recipe.mixture(step)]
        batch = mixed(recipe.tokens // length, length, shares, text, chance=chance, rng=rng)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        model.train()
        loss = loss_of(model, batch.tokens, batch.weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean.lerp_(loss.detach(), max(0.01, 1 / (step + 1)))
        yield step + 1, mean


def weighted_loss(model: Any, tokens: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over tokens of the cross entropy, given the tokens before, times the weight of the token.

    The model runs in bfloat16 under autocast.
    """
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits
    # The last logits have no target. The roll gives them the first token, whose weight is 0.
    losses = cross_entropy(logits.float().flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="none")
    return (losses * weights.roll(-1, 1).flatten()).sum()


def scored(model: Any, lengths: tuple[int, ...], items: int) -> Scores:
    """Return the accuracy of every task at every length, on items that are the same each time."""
    model.eval()
    scores: Scores = {}
    for name, task in TASKS.items():
        rng = torch.Generator(model.device).manual_seed(EVALUATION)
        scores[name] = {length: accuracy(model, task, length, rng, items=items) for length in lengths}
    return scores


def _optimizer(model: Any) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    scales = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=model.device.type == "cuda")


@contextmanager
def _termination() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM, which then does not end the process, and yield a function that says whether it came."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def _described(model: Any, recipe: Recipe, text: Text) -> dict[str, Any]:
    return {
        "recipe": asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "text": {"bytes": len(text.pool), "sha256": text.sha256},
    }


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def _line(seen: dict[str, Any]) -> str:
    scores = "  ".join(f"{name} {'/'.join(f'{100 * s:.0f}' for s in of.values())}" for name, of in seen["scores"].items())
    return f"step {seen['step']}, {seen['seconds']:.0f} s, loss {seen['loss']:.3f}: {scores}"


def _commit() -> str:
    result = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def main() -> None:
    """Run ``python -m bench.lab.train --out DIR``: print a line every 500 steps, and write a checkpoint with its log."""
    parser = argparse.ArgumentParser(prog="bench.lab.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for model.safetensors, config.json and log.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"default: {Recipe.steps}")
    parser.add_argument("--start", type=Path, help="folder of a model to continue from, with the second recipe")
    parser.add_argument("--commit", help="commit to record in the log (default: from git)")
    parser.add_argument("--smoke", action="store_true", help="train two layers for a few steps on the CPU")
    arguments = parser.parse_args()
    recipe = SMOKE if arguments.smoke else SECOND if arguments.start else Recipe()
    recipe = replace(recipe, steps=arguments.steps or recipe.steps)
    device = "cuda" if torch.cuda.is_available() and not arguments.smoke else "cpu"
    commit = arguments.commit or _commit()
    log = train(recipe, arguments.out, seed=arguments.seed, device=device, commit=commit, start=arguments.start)
    for name, of in log.get("scores", {}).items():
        print(f"{name}: " + ", ".join(f"{score:.1%} at {length}" for length, score in of.items()))
    print(f"{log['steps']} steps in {log['seconds']:.0f} s, written to {arguments.out}")


if __name__ == "__main__":
    main()
