"""One layer of a SparseCache, behind the layer interface of transformers: ``update`` and a few sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparse_compile.cache.device_positions import DevicePositions
from sparse_compile.cache.host_state import HostState
from sparse_compile.passes.ops.cache import cache_update  # noqa: F401  # registers the op that update() calls
from sparse_compile.passes.storage.codec import QuantizedTensor, dequantize
from sparse_compile.passes.storage.graph_text import to_text
from sparse_compile.passes.storage.layer_plan import LayerPlan, SelectionState, misfit, quantized_of


class SparseCacheLayer(CacheLayerMixin):
    """The keys and values of one layer: two buffers ``[max_batch, heads, slots, D]`` for each storage group.

    For quantized pages, ``quantized`` hold every column, and the buffers hold only the latest columns, unquantized.
    """

    is_compileable = True
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        plan: LayerPlan,
        buffers: list[Tensor],
        positions: DevicePositions,
        host_state: HostState,
        *,
        quantized: list[Tensor],
        frequencies: Tensor | None,
        own: list[SelectionState[Tensor]],
        selection: list[Tensor],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self.plan, self.buffers, self.positions, self.host_state = plan, buffers, positions, host_state
        self.quantized = quantized
        self._texts = to_text(plan), to_text(replace(plan, verifies=True))
        self.text = self._texts[0]  # Dynamo compiles a graph for each
        self.own, self.selection = own, selection  # page-selection state of this layer, and what its decode steps use
        self.stream = [] if frequencies is None else [*positions.stream, frequencies]
        self.dtype, self.device = buffers[0].dtype, buffers[0].device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the constructor has allocated the buffers, because a traced graph needs their addresses."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values ``[B, Hkv, Q, D]``. The backend replaces the tensors that this returns.

        Raises ``ValueError`` for tensors of another model, dtype or device, and ``SparseCacheError`` without the backend.
        """
        # While a graph is traced, the kv pass checks instead: after an error here Dynamo would run the model un-compiled.
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
            at.padding.valid,
            at.padding.is_left,
            self.selection,
            self.quantized,
            self.text,
        )
        return k, v

    @property
    def is_verifying(self) -> bool:
        """Whether the next new tokens are a few that speculative decoding verifies."""
        return self.text is self._texts[True]

    def set_verifying(self, verifies: bool) -> None:
        """Say whether the next new tokens are a few that speculative decoding verifies."""
        self.text = self._texts[verifies]

    def get_seq_length(self) -> Any:
        """The number of tokens seen so far, padding included: a tensor while a graph is traced, an int otherwise.

        A traced model uses this as the rotary position of its next token.
        """
        if not torch.compiler.is_compiling():
            return self.host_state.columns
        return self.positions.stream[0] if self.stream else self.positions.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return sizes for masks over all columns of the cache, as ``StaticCache`` does. Traced masks are never built."""
        return self.plan.columns, 0

    def get_max_length(self) -> int:
        """The maximum number of tokens of a sequence."""
        return self.host_state.max_length

    def summaries(self) -> list[tuple[Tensor, int]]:
        """The page summaries that this layer owns, and how many keys each entry describes."""
        chosen = [s.selection for s in self.plan.storages if s.leads(self.plan.layer)]
        pages = [selection.selector.page for selection in chosen if selection is not None]
        summaries = zip((choice.summary for choice in self.own), pages, strict=True)
        return [(summary, page) for summary, page in summaries if summary is not None]

    def quantized_parts(self) -> list[tuple[Tensor, int]]:
        """The tensors of the quantized keys and values, and how many columns each of their entries covers."""
        forms = [form for storage in self.plan.storages for form in storage.forms or ()]
        tokens = [n for form in forms for n in (1, *[form.tokens] * (form.count - 1))]
        return list(zip(self.quantized, tokens, strict=True))

    def restore_tails(self, remove: int) -> None:
        """Refill the tails of quantized pages for a cache without its last ``remove`` columns.

        Columns that the tails have overwritten are dequantized. If ``remove`` exceeds a page plus the cache's ``rollback``,
        which lengthens the tails, these columns include the group that is filled next. It is then quantized a second time.
        """
        end = self.host_state.columns
        for number, storage in enumerate(self.plan.storages):
            if storage.forms is None:
                continue
            tail_slots = storage.buffer_slots
            lost = torch.arange(max(0, end - remove - tail_slots), max(0, end - tail_slots), device=self.device)
            tails = self.buffers[2 * number : 2 * number + 2]
            for tail, quantized, form in zip(
                tails, quantized_of(self.plan, self.quantized, number), storage.forms, strict=True
            ):
                group = form.tokens  # ``first`` to ``last`` are the groups of the lost columns
                first, last = (int(lost[0]) // group, int(lost[-1]) // group + 1) if lost.numel() else (0, 0)
                sizes = (group, *[1] * (form.count - 1)) if group > 1 else (1,) * form.count
                parts = [part[:, :, first * size : last * size] for part, size in zip(quantized.used(), sizes, strict=True)]
                found = dequantize(QuantizedTensor(*parts), form, tail.dtype)
                tail.index_copy_(2, lost % tail_slots, found.index_select(2, lost - first * group))

    def tensors(self) -> list[Tensor]:
        """All tensors that this layer owns."""
        return [*self.buffers, *self.quantized, *(tensor for choice in self.own for tensor in choice.used())]

    @property
    def nbytes(self) -> int:
        """The bytes of the stored keys and values, and of the page-selection state."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def head_nbytes(self) -> tuple[int, ...]:
        """The bytes of the keys and values of each KV head."""
        each: dict[int, int] = {}
        for number, storage in enumerate(self.plan.storages):
            kept = self.buffers[2 * number : 2 * number + 2]
            kept += [part for quantized in quantized_of(self.plan, self.quantized, number) for part in quantized.used()]
            each |= {head: sum(part.nbytes for part in kept) // len(storage.heads) for head in storage.heads}
        return tuple(each[head] for head in sorted(each))

    def __repr__(self) -> str:
        return f"SparseCacheLayer({', '.join(map(str, self.plan.storages))})"
