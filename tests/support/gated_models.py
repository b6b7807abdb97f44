"""Models and batches for tests that train gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.calibration import Batches, train_gates
from sparse_compile.calibration.forward import compiled_hidden, last_hidden
from sparse_compile.dynamo import Backend, Hooks
from sparse_compile.head_profile import Profile, signature
from sparse_compile.masks import causal, sink, sliding_window
from sparse_compile.passes.calibration.mix_gates import mix_gates
from support.models import VOCABULARY
from support.oracles.cache import random_tokens

SINK, RECENT, LENGTH = 2, 5, 24
STREAMING = causal & (sink(SINK) | sliding_window(RECENT))
MIXED = ("llama", "llama mha", "qwen3", "mistral", "gemma3_text", "gemma2 eager", "gpt2", "opt", "gpt_oss")
SETTINGS: dict[str, Any] = {"sink": SINK, "recent": RECENT, "inner": "eager", "progress": False}


def random_gates(model: Any) -> list[nn.Parameter]:
    generator, sizes = torch.Generator().manual_seed(3), signature(model.config)
    return [nn.Parameter(torch.rand(sizes["kv_heads"], generator=generator)) for _ in range(sizes["layers"])]


def mixed(model: Any, leaves: Sequence[nn.Parameter], inner: str = "eager") -> Callable[[Tensor], Tensor]:
    backend = Backend(inner=inner, hooks=Hooks((partial(mix_gates, gates=leaves, streaming=STREAMING),), trains=True))
    return compiled_hidden(model, last_hidden, backend)


def last(step: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Random tokens of a step, with the last eight as asked tokens."""
    ids = random_tokens(LENGTH, batch=batch, seed=step)
    return ids, torch.arange(ids.shape[1]).expand_as(ids) >= ids.shape[1] - 8


class Toy(nn.Module):
    """A decoder that is not from transformers, with two layers that call the given attention."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], times: int = 1, kv_heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList([ToyLayer(attend, times) for _ in range(2)])
        sizes = {"num_attention_heads": 2, "num_key_value_heads": kv_heads, "num_hidden_layers": 2, "model_type": "toy"}
        self.config = SimpleNamespace(**sizes)
        with torch.no_grad():
            self.embed.weight.mul_(3)


class ToyLayer(nn.Module):
    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], times: int) -> None:
        super().__init__()
        self.qkv, self.drop, self.attend, self.times = nn.Linear(16, 48), nn.Dropout(0.2), attend, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
            x = x + self.drop(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x


def toy_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    assert isinstance(model, Toy)
    x: Tensor = model.embed(ids)
    for layer in model.layers:
        x = layer(x)
    return x


def sdpa(**options: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return partial(nn.functional.scaled_dot_product_attention, **options)


def toy(**options: Any) -> Toy:
    """A model that compiles fast, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Toy(sdpa(is_causal=True), **options)


def trained_toy(batches: Batches, model: Toy | None = None, **options: Any) -> Profile:
    return train_gates(model or toy(), batches, hidden=toy_hidden, **(SETTINGS | options))
