"""A compiled model with a cache, asked questions as in use: the context as a prompt, and what follows token by token."""

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
from sparse_compile.passes.storage.layer_plan import Ring

CHUNK = 512  # tokens of a prompt at once, where that changes nothing: masks over rings have a row for each sequence


class Session:
    """``rows`` sequences of at most ``length`` tokens at once.

    The model is compiled in place, by two graphs: one for prompts of any length and one for steps. All attention is the
    dense reference, whose results are those of the kernels.
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
        has_rings = any(isinstance(storage, Ring) for layer in self.cache.kept for storage in layer.plan.storages)
        self.chunk = CHUNK if has_rings and method.mode == "strict" else length
        self.model.compile(backend=Backend(method.policy, inner="eager", strict=True))

    @torch.no_grad()
    def right(self, items: Items, *, question: str = "decoded") -> Tensor:
        """``[B, turns]``: whether every token of a turn's answer is the most likely one, after the right tokens before it.

        The first question is ``decoded`` after the prompt, or ``prefilled`` as its end.
        """
        parts = [part.shape[1] for turn in items.turns for part in turn]
        begin = items.context.shape[1] + (parts[0] if question == "prefilled" else 0)
        tokens = items.tokens()
        is_right = torch.cat([self._guesses(rows, begin) for rows in tokens.split(self.rows)]) == tokens[:, begin:]
        answers = is_right.split(parts[1:] if question == "prefilled" else parts, dim=1)
        return torch.stack([answer.all(1) for answer in answers[question != "prefilled" :: 2]], dim=1)

    @torch.no_grad()
    def losses(self, tokens: Tensor, begin: int) -> Tensor:
        """``[B, N - begin]``: the cross entropy of the tokens from ``begin`` on, which are decoded one by one."""
        found = [
            cross_entropy(logits.float(), wanted, reduction="none")
            for logits, wanted in zip(self._logits(tokens, begin), tokens[:, begin:].to(self.device).unbind(1), strict=True)
        ]
        return torch.stack(found, dim=1).cpu()

    def _guesses(self, tokens: Tensor, begin: int) -> Tensor:
        return torch.stack([logits.argmax(-1) for logits in self._logits(tokens, begin)], dim=1).cpu()

    def _logits(self, tokens: Tensor, begin: int) -> Iterator[Tensor]:
        """For each token from ``begin`` on: ``[B, vocabulary]`` of what it might be."""
        self.cache.reset()
        tokens = tokens.to(self.device)
        yield self._prefilled(tokens[:, :begin])
        for at in range(begin, tokens.shape[1] - 1):
            yield self._forward(tokens[:, at : at + 1].clone())  # a clone, or Dynamo compiles again for another offset

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
