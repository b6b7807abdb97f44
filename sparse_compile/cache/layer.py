"""One layer of a SparseCache, as transformers sees it: ``update`` and a few sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparse_compile.cache.device_positions import Positions
from sparse_compile.cache.host_state import Books
from sparse_compile.passes.ops import cache_update  # noqa: F401  # registers the op that update() calls
from sparse_compile.passes.storage.codec import Codes, dequantize
from sparse_compile.passes.storage.layer_plan import Choice, LayerPlan, Pages, Ring, Storage, codes_of, misfit


class SparseCacheLayer(CacheLayerMixin):
    """The keys and values of one layer: two buffers ``[max_batch, heads, slots, D]`` for each way in which heads are kept.

    Of pages in fewer bits the buffers have the latest columns only, and ``codes`` all of them.
    """

    is_compileable = True
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        plan: LayerPlan,
        buffers: list[Tensor],
        positions: Positions,
        books: Books,
        *,
        codes: list[Tensor],
        frequencies: Tensor | None,
        own: list[Choice[Tensor]],
        selection: list[Tensor],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self.plan, self.buffers, self.positions, self.books = plan, buffers, positions, books
        self.codes = codes
        self.text = plan.to_text()
        self.own, self.selection = own, selection  # what is kept here to choose pages, and what steps use
        self.stream = [] if frequencies is None else [*positions.stream, frequencies]
        self.dtype, self.device = buffers[0].dtype, buffers[0].device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do: addresses have to be there before a graph is traced."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values ``[B, Hkv, Q, D]``; what comes back is for the backend to replace.

        Raises ``ValueError`` for tensors of another model, dtype or device, and ``SparseCacheError`` without the backend.
        """
        # While a graph is traced the kv pass checks: of an error here Dynamo makes a model that runs un-compiled from then on.
        why = "" if torch.compiler.is_compiling() else misfit(key_states, value_states, self.buffers, self.plan)
        if why:
            raise ValueError(why)
        at = self.positions
        k, v = torch.ops.sparse_compile.cache_update(
            key_states,
            value_states,
            at.columns,
            at.texts,
            at.page_texts,
            at.rings,
            self.buffers,
            self.stream,
            at.anchor,
            self.selection,
            self.codes,
            self.text,
        )
        return k, v

    def get_seq_length(self) -> Any:
        """The tokens seen so far, padding included: a tensor while a graph is traced, else a number.

        A traced model takes the rotary position of its next token from here.
        """
        if not torch.compiler.is_compiling():
            return self.books.columns
        return self.positions.stream[0] if self.stream else self.positions.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are written over all columns there may ever be, as for a ``StaticCache``; traced ones are not built."""
        return self.plan.columns, 0

    def get_max_length(self) -> int:
        """The most tokens the cache takes."""
        return self.books.max_length

    def digests(self) -> list[tuple[Tensor, int]]:
        """The digests of this layer's own pages, and how many keys each describes."""
        chosen = [s.selecting for s in self.plan.storages if isinstance(s, Pages)]
        pages = [s.selector.page for s in chosen if s is not None and s.leader == self.plan.layer]
        found = zip((choice.digest for choice in self.own), pages, strict=True)
        return [(digest, page) for digest, page in found if digest is not None]

    def encoded(self) -> list[tuple[Tensor, int]]:
        """The parts of all codes, and how many columns each of their places stands for."""
        forms = [form for s in self.plan.storages if isinstance(s, Pages) for form in s.forms or ()]
        tokens = [n for form in forms for n in (1, *[form.tokens] * (form.count - 1))]
        return list(zip(self.codes, tokens, strict=True))

    def restore_tails(self, remove: int) -> None:
        """Of encoded pages: what the tails no longer have of the columns before the last ``remove``, from the codes.

        A group that is filled further is then encoded a second time: where more is taken back than a page, and the
        ``rollback`` of the cache, which makes tails longer.
        """
        end = self.books.columns
        for number, storage in enumerate(self.plan.storages):
            if not isinstance(storage, Pages) or storage.forms is None:
                continue
            lost = torch.arange(max(0, end - remove - storage.tail), max(0, end - storage.tail), device=self.device)
            tails = self.buffers[2 * number : 2 * number + 2]
            for tail, codes, form in zip(tails, codes_of(self.plan, self.codes, number), storage.forms, strict=True):
                group = form.tokens  # the groups that they are in
                first, last = (int(lost[0]) // group, int(lost[-1]) // group + 1) if lost.numel() else (0, 0)
                sizes = (group, *[1] * (form.count - 1)) if group > 1 else (1,) * form.count
                parts = [part[:, :, first * size : last * size] for part, size in zip(codes.used(), sizes, strict=True)]
                found = dequantize(Codes(*parts), form, tail.dtype)
                tail.index_copy_(2, lost % storage.tail, found.index_select(2, lost - first * group))

    def tensors(self) -> list[Tensor]:
        """All that this layer keeps."""
        return [*self.buffers, *self.codes, *(tensor for choice in self.own for tensor in choice.used())]

    @property
    def nbytes(self) -> int:
        """The bytes of keys and values as they are kept, and of what describes their pages."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def head_nbytes(self) -> tuple[int, ...]:
        """The bytes of each KV head."""
        each: dict[int, int] = {}
        for number, storage in enumerate(self.plan.storages):
            kept = self.buffers[2 * number : 2 * number + 2]
            kept += [part for codes in codes_of(self.plan, self.codes, number) for part in codes.used()]
            each |= {head: sum(part.nbytes for part in kept) // len(storage.heads) for head in storage.heads}
        return tuple(each[head] for head in sorted(each))

    def __repr__(self) -> str:
        return f"SparseCacheLayer({', '.join(_written(storage) for storage in self.plan.storages)})"


def _written(storage: Storage) -> str:
    kept = f"{len(storage.heads)} heads x {storage.slots} slots"
    if isinstance(storage, Pages) and storage.forms is not None:
        kept += " in {}, {}".format(*(form.kind or "full" for form in storage.forms))
    if isinstance(storage, Ring):
        return f"{kept} (sink {storage.sink}, recent {storage.recent})"
    return kept if storage.selecting is None else f"{kept} ({storage.selecting.selector})"
