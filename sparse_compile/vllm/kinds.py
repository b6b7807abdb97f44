"""Find out of which kind a KV head is under a policy: what it stores, and which attention backend of vLLM serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_compile.masks import Mask, causal, sliding_window
from sparse_compile.masks.analysis import Past, visible_past
from sparse_compile.masks.operators import union
from sparse_compile.masks.selection.budget import check_budget
from sparse_compile.masks.selection.page_topk import PageTopK, choosing_together, has_selector, offered


@dataclass(frozen=True)
class Kind:
    """What one KV head is under a policy.

    - ``masks``: the masks of its query heads, the model's own mask included.
    - ``past``: which past tokens they see, or None if they need all of them.
    - ``stock``: whether they see just ``past``, and no sink, so that the platform's own backend serves them.
    - ``selector``: what selects the pages that decode steps read, or None if they read all visible ones.
    """

    masks: tuple[Mask, ...]
    past: Past | None
    stock: bool
    selector: PageTopK | None = None

    @property
    def name(self) -> str:
        """A word for the kind, without dots, because vLLM looks for numbers between the dots of a layer's name."""
        if self.selector is not None:
            return f"top{self.selector.tokens}"
        if self.stock:
            return "full" if self.past is None else f"window{self.past.recent}"
        return "masked" if self.past is None else f"sink{self.past.sink}_recent{self.past.recent}"

    @property
    def window(self) -> int | None:
        """The sliding window of a kind that the platform's own backend serves, or None if it sees all past tokens."""
        return None if self.past is None else self.past.recent


def kind_of(
    layer: int, model: Mask, prefill: Sequence[Mask], decode: Sequence[Mask], *, max_length: int, block_size: int
) -> Kind:
    """Return the kind of a KV head of ``layer`` whose query heads have these masks, in texts of up to ``max_length`` tokens.

    Raises ``ValueError`` for masks that vLLM cannot serve.
    """
    if any(map(has_selector, prefill)):
        raise ValueError(f"prompts inside vLLM read all pages, but layer {layer} has {prefill[0]} in a prefill: use causal")
    selector, together = choosing_together(decode)
    if selector is not None:
        _check_selector(layer, selector, prefill, together, max_length, block_size)
        return Kind(tuple(together), None, stock=False, selector=selector)
    if list(prefill) != together:
        raise ValueError(
            f"a batch of vLLM mixes prompts and decode steps, but the policy gives layer {layer} {prefill[0]} in a prefill and "
            f"{decode[0]} in a decode step: use one static mask for both"
        )
    for mask in together:
        _check_static(layer, mask, max_length)
    pasts = [visible_past(mask, max_length) for mask in together]
    past = None
    if all(one is not None for one in pasts):
        past = Past(max(one.sink for one in pasts if one), max(1, *(one.recent for one in pasts if one)))
    seen = causal if past is None else causal & sliding_window(past.recent)
    stock = (past is None or past.sink == 0) and all(seen.implies(mask) for mask in together)
    return Kind(tuple(together), past, stock)


def _check_selector(
    layer: int, selector: PageTopK, prefill: Sequence[Mask], decode: Sequence[Mask], max_length: int, block_size: int
) -> None:
    wrong = ""
    if selector.score != "minmax" or selector.every != 1 or selector.share is not None:
        wrong = "keeps minima and maxima and scores in every step and layer: leave score, every and share out"
    elif block_size % selector.page:
        wrong = f"reads blocks of {block_size} keys: give it a page that divides them, or set --block-size"
    elif not all(causal.implies(mask) for mask in (*prefill, *map(offered, decode))):
        wrong = (
            f"keeps every key and reads all of them in a prefill, but the prefill has {prefill[0]} and a decode step "
            f"{decode[0]}: use Policy(prefill=causal, decode=causal & (sink(n) | page_topk(...))) on a model without windows"
        )
    if wrong:
        raise ValueError(f"{selector} in layer {layer} inside vLLM {wrong}")
    for mask in decode:
        _check_static(layer, offered(mask), max_length)
    check_budget(selector, union(decode), max_length)


def _check_static(layer: int, mask: Mask, max_length: int) -> None:
    if mask.captures():
        raise ValueError(
            f"a mask inside vLLM serves many requests and cannot read tensors, but layer {layer} has {mask}: use patterns of "
            "positions, such as sink and sliding_window"
        )
    mask.check(1, 1, max_length, max_length)
