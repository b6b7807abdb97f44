"""Train a gate for each KV head that says how much full attention its answers need (DuoAttention, arXiv:2410.10819)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.calibration.checkpoint import Checkpoint
from sparse_compile.calibration.forward import Hidden, compiled_hidden, frozen, last_hidden, sizes_of
from sparse_compile.calibration.progress import Line, Steps, ticking
from sparse_compile.dynamo import Backend, Hooks
from sparse_compile.head_profile import Profile, signature
from sparse_compile.masks import causal, sliding_window
from sparse_compile.masks import sink as first_tokens

Batches = Callable[[int], tuple[Tensor, Tensor]]  # step -> tokens [B, N], and bool [B, N] for those that count
STEPS, RATE, PENALTY = 2000, 0.02, 0.05  # as published


def train_gates(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int = STEPS,
    sink: int = 128,
    recent: int = 256,
    rate: float = RATE,
    penalty: float = PENALTY,
    resume: str | Path | None = None,
    inner: str = "inductor",
    progress: bool = True,
    hidden: Hidden = last_hidden,
) -> Profile:
    """Train gates and return them as a profile. A high gate means that a KV head needs keys beyond a sink and a window.

    Heads compute ``a * full + (1 - a) * streaming``. Only the gates ``a`` are trained, and they start at 1. The loss is the
    squared error of the last hidden states against full attention, averaged over channels and asked tokens, plus ``penalty``
    times the mean gate. The optimizer is AdamW without weight decay. The learning rate rises over the first fifth of the steps
    and falls over the last fifth.

    ``batches(step)`` returns tokens ``[B, N]``, and which of them are asked, bool ``[B, N]``: only those count in the loss. It
    has to return the same batch whenever it is called for the same step. ``Passkeys`` works for any model. ``resume`` is a
    checkpoint file. Training continues from it if it exists, and writes it every 100 steps and every minute. The file records
    ``batches.digest``, if there is one, and training refuses a file of other data. With ``progress``, a line on stderr
    says which step is done and how much time is left, which ``batches.length(step)`` helps to estimate, if there is one.
    ``hidden`` computes the states that are compared, ``[B, N, *]``; pass it for models that are not from transformers.

        >>> tokens, asked = torch.randint(64, (2, 48)), torch.arange(48).expand(2, 48) >= 40
        >>> profile = train_gates(model, lambda step: (tokens, asked), steps=2, sink=2, recent=8, inner="eager", progress=False)
        >>> profile.method, len(profile.scores)
        ('gates', 2)

    Raises ``ValueError`` for a model without config or causal layers, for batches of other shapes, and for a file of another
    run.
    """
    if steps < 1:
        raise ValueError(f"train_gates needs steps >= 1, got {steps}")
    config = sizes_of(model)
    identity = signature(config)
    device = next(model.parameters()).device
    gates = [nn.Parameter(torch.ones(identity["kv_heads"], device=device)) for _ in range(identity["layers"])]
    optimizer = torch.optim.AdamW(gates, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_at, steps=steps))
    settings = {"steps": steps, "sink": sink, "recent": recent, "rate": rate, "penalty": penalty}
    run: dict[str, Any] = settings | {"model": identity, "data": getattr(batches, "digest", "")}
    if resume is not None:
        run |= {"dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "weights": _digest(model)}
    saved = Checkpoint(gates, optimizer, schedule, run, Path(resume) if resume is not None else None)
    start, last = saved.load()
    streaming = causal & (first_tokens(sink) | sliding_window(recent))
    mixing = Hooks((_mixing(gates, streaming),), trains=True)
    backends = Backend(inner=inner), Backend(inner=inner, hooks=mixing)
    teacher, student = (compiled_hidden(model, hidden, backend) for backend in backends)
    told = Steps(start, steps, Line(progress), length=getattr(batches, "length", None), compiles=partial(_compiles, backends))
    with frozen(model), torch.enable_grad(), ticking(told.text, told.line):
        for step in range(start, steps):
            tokens, asked = _checked(*batches(step), device)
            with torch.no_grad():
                wanted = teacher(tokens)[asked]
            error = (student(tokens)[asked].float() - wanted.float()).square().mean(dim=-1).mean()
            last, mean = _descend(gates, error, penalty, optimizer)
            schedule.step()
            told.note(step, tokens.shape[1], f"loss {last:.4g}, mean gate {mean:.3f}")
            saved.save(step + 1, last, last=step + 1 == steps)
    numbers = settings | {"loss": last} | ({"data": run["data"]} if run["data"] else {})
    return Profile(torch.stack(list(gates)).tolist(), method="gates", model=identity, numbers=numbers)


def _descend(gates: list[nn.Parameter], error: Tensor, penalty: float, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Make one step of gradient descent, and keep the gates in 0..1. Returns the loss and the mean gate before the step."""
    mean = torch.stack(list(gates)).mean()
    optimizer.zero_grad()
    # The error is differentiated first and alone, because it reaches only the gates of layers that were recognized.
    if error.requires_grad:
        error.backward()
    _check_reached(gates)
    (penalty * mean).backward()
    optimizer.step()
    with torch.no_grad():
        for gate in gates:
            gate.clamp_(0, 1)
    return float(error.detach() + penalty * mean.detach()), float(mean.detach())


def rate_at(step: int, *, steps: int) -> float:
    """The learning-rate factor: it rises to 1 over a fifth of the steps, falls over the last fifth, and is at least 0.1."""
    return min(1.0, max((step + 1) / (steps / 5), 0.1), max((steps - step) / (steps / 5), 0.1))


def _compiles(backends: tuple[Backend, ...]) -> int:
    return sum(backend.report.compiles for backend in backends)


def _mixing(gates: list[nn.Parameter], streaming: Any) -> Callable[[Any], int]:
    from sparse_compile.passes.calibration.mix_gates import mix_gates

    return partial(mix_gates, gates=gates, streaming=streaming)


def _digest(model: nn.Module) -> str:
    """A hash that identifies the weights of a model: the sum of each weight, which is enough to notice another checkpoint."""
    sums = [float(weight.detach().double().sum()) for weight in model.parameters()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def _checked(tokens: Tensor, asked: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    if tokens.dim() != 2 or asked.shape != tokens.shape or asked.dtype != torch.bool or not bool(asked.any()):
        raise ValueError(
            "a batch needs tokens [B, N], and asked tokens as bool [B, N] with at least one true, got "
            f"{list(tokens.shape)} and {asked.dtype} {list(asked.shape)} with {int(asked.sum())} true"
        )
    return tokens.to(device), asked.to(device)


def _check_reached(gates: list[nn.Parameter]) -> None:
    missing = [layer for layer, gate in enumerate(gates) if gate.grad is None]
    if missing:
        raise ValueError(f"layers {missing} have no causal attention that was recognized: call explain(model, ...) to see why")
