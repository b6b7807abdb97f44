"""Evaluate a compiled model with a cache as in real use: prefill the context, and decode what follows token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.lab.data.items import Items
from bench.lab.evaluation.budgets import PAGE
from bench.lab.evaluation.methods import Method
from sparse_compile import Backend, SparseCache

# Tokens of a prompt chunk, in strict prefills over rings. Chunks do not change the results of these, and they save memory,
# because masks over rings have a row for each sequence.
CHUNK = 512


class Session:
    """A model and a cache for ``rows`` sequences of at most ``length`` tokens at once.

    The model is compiled in place into two graphs: one for prompts of any length and one for decode steps. All attention runs
    on the dense reference, which gives the same results as the kernels.
    """

    def __init__(self, model: Any, method: Method, *, rows: int, length: int) -> None:
        torch._dynamo.reset()  # graphs of another method would count as recompiles of this one
        self.model, self.rows, self.device = model.to(method.dtype), rows, model.device
        self.cache = SparseCache(
            model.config,
            method.policy,
            max_length=length,
            max_batch=rows,
            page_size=PAGE,
            dtype=method.dtype,
            device=self.device,
            mode=method.mode,
            kv=method.kv,
        )
        has_rings = any(not storage.holds_every_key for layer in self.cache.cached_layers for storage in layer.plan.storages)
        self.chunk = CHUNK if has_rings and method.mode == "strict" else length
        self.model.compile(backend=Backend(method.policy, inner="eager", strict=True))

    @torch.no_grad()
    def right(self, items: Items, *, question: str = "decoded") -> Tensor:
        """Return ``[B, turns]``: whether every token of a turn's answer is the most likely one, given the tokens before it.

        The tokens before are always the right ones. The first question is ``decoded`` after the prompt, or ``prefilled`` as
        the end of the prompt.
        """
        parts = [part.shape[1] for turn in items.turns for part in turn]
        begin = items.context.shape[1] + (parts[0] if question == "prefilled" else 0)
        tokens = items.tokens()
        is_right = torch.cat([self._guesses(rows, begin) for rows in tokens.split(self.rows)]) == tokens[:, begin:]
        answers = is_right.split(parts[1:] if question == "prefilled" else parts, dim=1)
        return torch.stack([answer.all(1) for answer in answers[question != "prefilled" :: 2]], dim=1)

    @torch.no_grad()
    def losses(self, tokens: Tensor, begin: int) -> Tensor:
        """Return ``[B, N - begin]``: the cross entropy of the tokens from ``begin`` on, which are decoded one by one."""
        losses = [
            cross_entropy(logits.float(), wanted, reduction="none")
            for logits, wanted in zip(self._logits(tokens, begin), tokens[:, begin:].to(self.device).unbind(1), strict=True)
        ]
        return torch.stack(losses, dim=1).cpu()

    def _guesses(self, tokens: Tensor, begin: int) -> Tensor:
        return torch.stack([logits.argmax(-1) for logits in self._logits(tokens, begin)], dim=1).cpu()

    def _logits(self, tokens: Tensor, begin: int) -> Iterator[Tensor]:
        """Yield the logits ``[B, vocabulary]`` of each token from ``begin`` on."""
        self.cache.reset()
        tokens = tokens.to(self.device)
        yield self._prefilled(tokens[:, :begin])
        for at in range(begin, tokens.shape[1] - 1):
            yield self._forward(tokens[:, at : at + 1].clone())  # without the clone, Dynamo recompiles for another offset

    def _prefilled(self, prompt: Tensor) -> Tensor:
        logits = prompt
        for chunk in prompt.tensor_split(-(-prompt.shape[1] // self.chunk), dim=1):
            ids = chunk.clone()
            torch._dynamo.maybe_mark_dynamic(ids, 1)  # one graph for prompts of all lengths
            logits = self._forward(ids)
        return logits

    def _forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]
        return logits
