"""The presses of kvpress within a budget, asked on a stock model; runs where kvpress is, without sparse_compile."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.lab.data.items import Items

SINK = 4


class Pressed(NamedTuple):
    """A press within a budget, and the share of a dense cache that it masks and still holds."""

    name: str
    budget: float
    press: Any
    masked: float = 0
    note: str = ""


FULL = Pressed("full", 1, None)


def presses(length: int, begin: int, gates: list[list[float]], budget: float) -> Iterator[Pressed]:
    """For prompts of ``begin`` tokens: what presses keep of them fits the budget together with all that follows."""
    kvpress: Any = importlib.import_module("kvpress")
    after = length - 1 - begin  # the last token is never a key
    kept = int(budget * length) - after
    ratio, window = 1 - (kept + 0.5) / begin, min(64, kept // 2)  # half a token more, as kvpress rounds down
    yield Pressed("StreamingLLM", budget, kvpress.StreamingLLMPress(ratio, SINK))
    yield Pressed("SnapKV", budget, kvpress.SnapKVPress(ratio, window), note=f"window {window}")
    yield Pressed("Knorm", budget, kvpress.KnormPress(ratio))
    yield _by_heads("DuoAttention", length, begin, gates, budget, after)
    yield _by_heads("DuoAttention, prompt alone in the budget", length, begin, gates, budget, 0)


def _by_heads(name: str, length: int, begin: int, gates: list[list[float]], budget: float, after: int) -> Pressed:
    """As many full heads as the budget pays for, if the others hold a sink, a window and ``after`` tokens that follow."""
    heads, least = sum(map(len, gates)), SINK + 1 + after
    tokens = int(budget * length * heads)
    full = (tokens - heads * least) // (length - least)
    recent = (tokens - full * length) // (heads - full) - SINK - after
    kvpress: Any = importlib.import_module("kvpress")

    class Gated(kvpress.DuoAttentionPress):  # type: ignore[misc]
        """With our scores of heads and sizes in place of published ones."""

        def load_attention_pattern(self, model: Any) -> tuple[int, int, Any]:
            return SINK, recent, torch.tensor(gates, dtype=torch.float64).numpy()

    masked = (heads - full) * (begin - SINK - recent) / (heads * length)
    note = f"{full} of {heads} heads full, recent {recent}; masked, not freed"
    return Pressed(name, budget, Gated(1 - full / heads), masked, note)


@torch.no_grad()
def asked(model: Any, items: Items, begin: int, pressed: Sequence[Pressed], *, rows: int) -> Iterator[tuple[Tensor, float]]:
    """For each press, ``[B]``: whether all answers are right, and the share that keys and values hold at the end."""
    tokens, answers, shape = items.tokens(), items.asked()[:, begin:], model.config
    dense = 4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * tokens.numel()
    guesses: list[list[Tensor]] = [[] for _ in pressed]
    held = [0.0] * len(pressed)
    for batch in tokens.split(rows):
        first, kept = _prefilled(model, batch[:, :begin], [one.press for one in pressed])
        for number, (cache, masks) in enumerate(kept):
            for layer, mask in zip(model.model.layers, masks, strict=True):
                layer.self_attn.masked_key_indices = mask
            found = [first]
            for at in range(begin, tokens.shape[1] - 1):  # positions go on from the whole context, as in kvpress' pipeline
                place = torch.full((len(batch), 1), at)
                logits = model(input_ids=batch[:, at : at + 1], past_key_values=cache, position_ids=place).logits
                found.append(logits[:, -1].argmax(-1))
            guesses[number].append(torch.stack(found, dim=1))
            held[number] += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / dense
    for guessed, share in zip(guesses, held, strict=True):
        yield ((torch.cat(guessed) == tokens[:, begin:]) | ~answers).all(1), share


def _prefilled(model: Any, prompt: Tensor, several: Sequence[Any]) -> tuple[Tensor, list[tuple[Any, list[Any]]]]:
    """The first guess, and the cache and masks by layer of each press: all see one prefill, which none of them changes."""
    from transformers import DynamicCache

    base: Any = importlib.import_module("kvpress").BasePress
    kept: list[tuple[Any, list[Any]]] = [(DynamicCache(), []) for _ in several]

    class Several(base):  # type: ignore[misc]
        """Every press compresses keys and values into a cache of its own."""

        def compress(self, module: Any, hidden: Any, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            for press, (cache, masks) in zip(several, kept, strict=True):
                module.masked_key_indices = None
                pair = press.compress(module, hidden, keys, values, *rest) if press else (keys, values)
                cache.update(*pair, module.layer_idx)
                masks.append(module.masked_key_indices)
            return keys, values

    for press in filter(None, several):
        press.post_init_from_model(model)
    with Several()(model):
        logits = model(input_ids=prompt, past_key_values=DynamicCache(), logits_to_keep=1).logits
    return logits[:, -1].argmax(-1), kept
