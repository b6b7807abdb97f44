"""Find out of which kind a KV head is under a policy: what it stores, and which attention backend of vLLM serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_compile.masks import Mask, causal, sliding_window
from sparse_compile.masks.analysis import Past, visible_past
from sparse_compile.masks.selection.page_topk import has_selector


@dataclass(frozen=True)
class Kind:
    """What one KV head is under a policy.

    - ``masks``: the masks of its query heads, the model's own mask included.
    - ``past``: which past tokens they see, or None if they need all of them.
    - ``stock``: whether they see just ``past``, and no sink, so that the platform's own backend serves them.
    """

    masks: tuple[Mask, ...]
    past: Past | None
    stock: bool

    @property
    def name(self) -> str:
        """A word for the kind, without dots, because vLLM looks for numbers between the dots of a layer's name."""
        if self.stock:
            return "full" if self.past is None else f"window{self.past.recent}"
        return "masked" if self.past is None else f"sink{self.past.sink}_recent{self.past.recent}"

    @property
    def window(self) -> int | None:
        """The sliding window of a kind that the platform's own backend serves, or None if it sees all past tokens."""
        return None if self.past is None else self.past.recent

    @property
    def stored(self) -> Past | None:
        """The tokens that vLLM stores for such a head, or None for all of them. Heads that store alike share cache groups."""
        return self.past


def kind_of(layer: int, model: Mask, prefill: Sequence[Mask], decode: Sequence[Mask], max_length: int) -> Kind:
    """Return the kind of a KV head of ``layer`` whose query heads have these masks, in texts of up to ``max_length`` tokens.

    Raises ``ValueError`` for masks that vLLM cannot serve.
    """
    for mask in (*prefill, *decode):
        if has_selector(mask):
            raise ValueError(f"layer {layer} selects pages by {mask}, which the plug-in does not do: use a static mask")
        _check_static(layer, mask, max_length)
    if list(prefill) != list(decode):
        raise ValueError(
            f"a batch of vLLM mixes prompts and decode steps, but the policy gives layer {layer} {prefill[0]} in a prefill and "
            f"{decode[0]} in a decode step: use one static mask for both"
        )
    pasts = [visible_past(mask, max_length) for mask in decode]
    past = None
    if all(one is not None for one in pasts):
        past = Past(max(one.sink for one in pasts if one), max(1, *(one.recent for one in pasts if one)))
    seen = causal if past is None else causal & sliding_window(past.recent)
    stock = (past is None or past.sink == 0) and all(seen.implies(mask) for mask in decode)
    return Kind(tuple(decode), past, stock)


def _check_static(layer: int, mask: Mask, max_length: int) -> None:
    if mask.captures():
        raise ValueError(
            f"a mask inside vLLM serves many requests and cannot read tensors, but layer {layer} has {mask}: use patterns of "
            "positions, such as sink and sliding_window"
        )
    mask.check(1, 1, max_length, max_length)
