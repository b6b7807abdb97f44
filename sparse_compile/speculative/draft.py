"""Draft tokens with decode steps under the policy of a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Processors of transformers that remember earlier calls. A draft that may be dropped would change what they do later.
REMEMBERING = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


def harmless(processors: Sequence[Any]) -> list[Any]:
    """The logits processors that a draft may call: those of transformers that remember nothing.

    A draft without the others is right less often. The tokens of ``generate`` still pass all of them.
    """
    return [each for each in processors if _is_of_transformers(each) and type(each).__name__ not in REMEMBERING]


def _is_of_transformers(processor: Any) -> bool:
    return type(processor).__module__.startswith("transformers.")


class Drafter:
    """Proposes the tokens that ``generate`` would choose if the logits of the sparse steps were those of the full model.

    ``generate`` samples from the logits of the full model, with the random numbers that come next. Drafts are sampled with the
    same random numbers, so that they agree wherever both distributions do. The state of the generators is restored.
    """

    def __init__(self, processors: Sequence[Any], *, samples: bool) -> None:
        self.processors, self.samples = harmless(processors), samples

    def draft(self, step: Callable[[Tensor, int], Tensor], ids: Tensor, count: int) -> Tensor:
        """Return ``count`` tokens ``[B, count]`` that may follow the text ``ids`` ``[B, n]``.

        ``step(token, n)`` runs the model on the ``n``-th token ``[B, 1]`` from the last one of the text on, and returns logits
        ``[B, 1, V]``.
        """
        token, drafts = ids[:, -1:], list[Tensor]()
        devices = [ids.device] if ids.is_cuda else []
        with torch.random.fork_rng(devices, enabled=self.samples):
            for number in range(count):
                scores = step(token, number)[:, -1].float()
                for processor in self.processors:
                    scores = processor(ids, scores)
                token = self._choose(scores)
                drafts.append(token)
                if self.processors:
                    ids = torch.cat((ids, token), dim=1)
        return torch.cat(drafts, dim=1) if drafts else ids[:, :0]

    def _choose(self, scores: Tensor) -> Tensor:
        if self.samples:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1)
        return scores.argmax(dim=-1, keepdim=True)
