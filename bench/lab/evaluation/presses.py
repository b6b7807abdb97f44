"""Run the presses of kvpress within a budget on a stock model. This module needs kvpress, but not sparse_compile."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.lab.data.items import Items

SINK = 4


class Pressed(NamedTuple):
    """A press within a budget, and the share of a dense cache that it masks but still holds."""

    name: str
    budget: float
    press: Any
    masked: float = 0
    note: str = ""


FULL = Pressed("full", 1, None)


def presses(length: int, begin: int, gates: list[list[float]], budget: float) -> Iterator[Pressed]:
    """Yield the presses for prompts of ``begin`` tokens, out of ``length`` in all.

    What a press keeps of the prompt fits the budget together with all tokens that follow. The last variant of DuoAttention
    counts the prompt alone.
    """
    kvpress: Any = importlib.import_module("kvpress")
    after = length - 1 - begin  # the last token is never a key
    kept = int(budget * length) - after
    ratio, window = 1 - (kept + 0.5) / begin, min(64, kept // 2)  # half a token more, because kvpress rounds down
    yield Pressed("StreamingLLM", budget, kvpress.StreamingLLMPress(ratio, SINK))
    yield Pressed("SnapKV", budget, kvpress.SnapKVPress(ratio, window), note=f"window {window}")
    yield Pressed("Knorm", budget, kvpress.KnormPress(ratio))
    yield _by_heads("DuoAttention", length, begin, gates, budget, after)
    yield _by_heads("DuoAttention, prompt alone in the budget", length, begin, gates, budget, 0)


def _by_heads(name: str, length: int, begin: int, gates: list[list[float]], budget: float, after: int) -> Pressed:
    """Return a press with as many full heads as the budget pays for.

    The other heads hold a sink, a window and the ``after`` tokens that follow the prompt.
    """
    heads, least = sum(map(len, gates)), SINK + 1 + after
    tokens = int(budget * length * heads)
    full = (tokens - heads * least) // (length - least)
    recent = (tokens - full * length) // (heads - full) - SINK - after
    kvpress: Any = importlib.import_module("kvpress")

    class Gated(kvpress.DuoAttentionPress):  # type: ignore[misc]
        """DuoAttention with our head scores and sizes in place of the published ones."""

        def load_attention_pattern(self, model: Any) -> tuple[int, int, Any]:
            return SINK, recent, torch.tensor(gates, dtype=torch.float64).numpy()

    masked = (heads - full) * (begin - SINK - recent) / (heads * length)
    note = f"{full} of {heads} heads full, recent {recent}; masked, not freed"
    return Pressed(name, budget, Gated(1 - full / heads), masked, note)


@torch.no_grad()
def asked(model: Any, items: Items, begin: int, pressed: Sequence[Pressed], *, rows: int) -> Iterator[tuple[Tensor, float]]:
    """Yield for each press whether all answers are right, ``[B]``, and the share that keys and values hold at the end."""
    tokens, answers, shape = items.tokens(), items.asked()[:, begin:], model.config
    dense = 4 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * tokens.numel()
    guesses: list[list[Tensor]] = [[] for _ in pressed]
    held = [0.0] * len(pressed)
    for batch in tokens.split(rows):
        first, kept = _prefilled(model, batch[:, :begin], [one.press for one in pressed])
        for number, (cache, masks) in enumerate(kept):
            for layer, mask in zip(model.model.layers, masks, strict=True):
                layer.self_attn.masked_key_indices = mask
            guessed = [first]
            for at in range(begin, tokens.shape[1] - 1):  # positions continue from the whole context, as in kvpress' pipeline
                place = torch.full((len(batch), 1), at)
                logits = model(input_ids=batch[:, at : at + 1], past_key_values=cache, position_ids=place).logits
                guessed.append(logits[:, -1].argmax(-1))
            guesses[number].append(torch.stack(guessed, dim=1))
            held[number] += sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / dense
    for batches, share in zip(guesses, held, strict=True):
        yield ((torch.cat(batches) == tokens[:, begin:]) | ~answers).all(1), share


def _prefilled(model: Any, prompt: Tensor, several: Sequence[Any]) -> tuple[Tensor, list[tuple[Any, list[Any]]]]:
    """Return the first guess, and the cache and the masks by layer of each press.

    All presses see the same prefill, which none of them changes.
    """
    from transformers import DynamicCache

    base: Any = importlib.import_module("kvpress").BasePress
    kept: list[tuple[Any, list[Any]]] = [(DynamicCache(), []) for _ in several]

    class Several(base):  # type: ignore[misc]
        """Lets every press compress keys and values into its own cache."""

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
