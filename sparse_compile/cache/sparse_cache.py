"""SparseCache: a transformers cache that holds what its policy still sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sparse_compile.cache import serialization
from sparse_compile.cache.device_positions import Positions
from sparse_compile.cache.host_state import Books
from sparse_compile.cache.kv_format import ByLayer, check_formats, formats_of
from sparse_compile.cache.layer import SparseCacheLayer
from sparse_compile.cache.page_buffers import Selection
from sparse_compile.cache.planning import Geometry, check_dtype, check_sizes, plan_layers
from sparse_compile.cache.rope import in_cache_positions
from sparse_compile.masks import Mask
from sparse_compile.passes.ops.cache_update import SparseCacheError
from sparse_compile.passes.storage.layer_plan import Pages, Ring
from sparse_compile.passes.torch_private import mark_static, real_tensors
from sparse_compile.policy import Policy, as_policy


class SparseCache(Cache):
    """A KV cache whose memory follows the policy: ``model.generate(..., past_key_values=cache)`` on a compiled model.

    KV heads whose masks see no more than a sink and a window keep a ring of those tokens; all others keep every token. Which
    is which is asked of the masks, the model's own (sliding windows of the config) and the policy's, for prefill and decode
    together. Compile the model with the same policy, or with none: the masks of both apply.

    ``max_length`` is the most tokens of a sequence, prompt and padding included; everything is allocated now, for
    ``max_batch`` sequences, in ``dtype`` (the config's) on ``device``. Rings are as long as whole pages of ``page_size``
    tokens that hold sink, window and ``rollback`` more tokens, which ``crop`` may take back of a full ring.

    ``kv`` keeps pages in fewer bits: ``"int8"``, ``"fp8"``, ``"int4"`` or a ``KVFormat``, one for all or a sequence with one
    for each layer, in which a sequence has one for each KV head. A step reads them as they are (on CPU, and under masks and
    score mods that only FlexAttention knows, they are decoded for each call). New tokens of a prompt attend to one another as
    they are, and to what is kept of those before; a ring stays in ``dtype``, as it is small. ``debug`` raises ``ValueError``
    where numbers to encode (``kv``) are not finite; it waits for the device, forbids CUDA graphs, and wants ``reset`` then.

    ``mode`` is ``strict`` (each query sees exactly what the mask says, however a prompt is cut into chunks) or
    ``chunk_relaxed`` (each chunk sees itself, and of what came before what the mask shows to the position before it:
    DuoAttention's published prefill, which depends on the chunks).

    With ``cache_positions`` a query stands where it would in the cache, not in the text (StreamingLLM,
    https://arxiv.org/abs/2309.17453): the sink stays near, and texts may be longer than any position the model knows. It needs
    rotary position embeddings, and a policy under which every head forgets; ``max_length`` may then be as large as you like
    when the model is called token by token or chunk by chunk. ``generate`` and padding write masks over all of ``max_length``.

        >>> policy = sc.policies.streaming_llm(sink=4, recent=28)
        >>> cache = sc.SparseCache(model.config, policy, max_length=4096)
        >>> model = sc.compile(model, policy, inner="eager")
        >>> model.generate(tokens, max_new_tokens=2, past_key_values=cache).shape
        torch.Size([1, 10])
        >>> cache.nbytes < cache.dense_nbytes / 10
        True

    Raises ``ValueError`` or ``TypeError`` for sizes, a policy or a config that make no cache. In use: ``SparseCacheError``
    without the backend, beyond ``max_length``, and where a ring no longer has what is asked for; ``ValueError`` for tensors of
    another model, dtype, device or a larger batch. The cache then holds what it held before. Graphs that read a cache have no
    gradients.
    """

    def __init__(
        self,
        config: Any,
        policy: Policy | Mask | None = None,
        *,
        max_length: int,
        max_batch: int = 1,
        page_size: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mode: str = "strict",
        cache_positions: bool = False,
        rollback: int = 0,
        kv: ByLayer = None,
        debug: bool = False,
    ) -> None:
        check_sizes(max_length, max_batch, page_size, rollback)
        dtype = dtype or getattr(config, "dtype", None) or torch.get_default_dtype()
        check_dtype(dtype)
        device = torch.device(device) if device is not None else torch.get_default_device()
        self.geometry, self.policy = Geometry.of(config), as_policy(policy)
        self.max_length, self.max_batch, self.mode = max_length, max_batch, mode
        self._adds_no_mask = getattr(config, "_attn_implementation", None) != "eager"
        sizes = {"max_length": max_length, "page_size": page_size, "rollback": rollback}
        formats = formats_of(kv, len(self.geometry.masks), self.geometry.kv_heads)
        check_formats(formats, device)
        with real_tensors():  # masks are asked, also where nothing else is computed
            plans = plan_layers(self.geometry, self.policy, **sizes, mode=mode, formats=formats, debug=debug)
        frequencies: list[Tensor | None] = [None] * len(plans)
        if cache_positions:
            plans, frequencies = in_cache_positions(plans, config, self.geometry.key_dim, device)
        has_pages = any(isinstance(storage, Pages) for plan in plans for storage in plan.storages)
        selects = any(isinstance(s, Pages) and s.selecting is not None for plan in plans for s in plan.storages)
        columns = plans[0].columns if has_pages else 0
        self.positions = Positions(max_batch, columns, plans[0].rings, device, moving=cache_positions, selects=selects)
        self.books = Books(max_length, max_batch, len(plans))
        dims = self.geometry.key_dim, self.geometry.value_dim
        selection = Selection(plans, self.geometry.key_dim, max_batch, dtype, device)
        kept = []
        for plan, turns in zip(plans, frequencies, strict=True):
            slots = [(len(s.heads), (s.tail if isinstance(s, Pages) else 0) or s.slots) for s in plan.storages]
            shapes = [((*size, dim), dtype) for size in slots for dim in dims]
            encoded = [part for s in plan.storages if isinstance(s, Pages) for part in s.code_shapes(dims, dtype)]
            # Not ``empty``: a masked value takes part with weight 0, and 0 * NaN is NaN.
            buffers, codes = (
                [torch.zeros((max_batch, *shape), dtype=kind, device=device) for shape, kind in group]
                for group in (shapes, encoded)
            )
            chosen: dict[str, Any] = {"own": selection.own(plan), "selection": selection.used(plan)}
            state = SparseCacheLayer(plan, buffers, self.positions, self.books, codes=codes, frequencies=turns, **chosen)
            kept.append(state)
        self.kept = tuple(kept)  # ``layers``, by their own type
        layers: list[Any] = kept
        super().__init__(layers=layers)
        self.positions.columns.sparse_cache_books = self.books  # type: ignore[attr-defined]  # how the backend finds the books
        for tensor in self._tensors():
            mark_static(tensor)  # or a second cache of another size would make the sizes of both dynamic

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the new keys and values of a layer; models call this. See ``SparseCacheLayer.update``."""
        if layer_idx >= len(self.kept) and not torch.compiler.is_compiling():
            raise ValueError(f"the cache has {len(self.kept)} layers, and the model a layer {layer_idx}: use its own config")
        # A layer too many, traced, gets the last one's place; the kv pass refuses that.
        return self.kept[min(layer_idx, len(self.kept) - 1)].update(key_states, value_states)

    # -- what it holds ----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """The bytes that are resident: keys and values with their scales, offsets and tails, digests and positions."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def dense_nbytes(self) -> int:
        """The bytes of a dense cache of the same lengths, as ``StaticCache`` allocates it."""
        geometry, each = self.geometry, self.kept[0].dtype.itemsize
        token = len(self.kept) * geometry.kv_heads * (geometry.key_dim + geometry.value_dim) * each
        return token * self.max_batch * self.max_length

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` should write out masks itself, which keeps the shapes of decode steps.

        A padded prompt is better off with the two-dimensional mask, which the backend reads as padding; so is eager attention,
        which adds its mask to the scores, and may add anything else.
        """
        if torch.compiler.is_compiling():
            return True
        return self._adds_no_mask and (self.max_batch == 1 or self.books.columns > 0)

    def _tensors(self) -> list[Tensor]:
        frequencies = {id(layer.stream[2]): layer.stream[2] for layer in self.kept if layer.stream}
        return [
            *self.positions.tensors(),
            *frequencies.values(),
            *(tensor for layer in self.kept for tensor in layer.tensors()),
        ]

    def __repr__(self) -> str:
        held = f"{self.books.columns} of {self.max_length} tokens, {self.nbytes / 2**20:.1f} MiB"
        return f"SparseCache({held}, dense {self.dense_nbytes / 2**20:.1f} MiB, layers={self.layers})"

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The column of the next token: a tensor while a graph is traced, else a number."""
        return self.positions.columns if torch.compiler.is_compiling() else self.books.columns

    # -- what can be done to it -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything. Addresses stay."""
        self.positions.clear()
        self.books.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens: ``crop(-3)`` is as if they had never been there.

        Raises ``SparseCacheError`` if a ring has already overwritten what would be visible again; ``rollback`` of the
        constructor makes room. Raises ``ValueError`` for positive numbers and for more tokens than there are.
        """
        remove = -tokens_to_remove
        if remove < 0:
            raise ValueError(f"crop takes back tokens and needs a number of at most 0, got {tokens_to_remove}: crop(-n)")
        if remove > self.books.columns:
            raise ValueError(f"the cache holds {self.books.columns} tokens, and {remove} cannot be taken back")
        if remove == self.books.columns:
            self.reset()
        if remove == 0 or self.books.columns == 0:
            return
        at, rows = self.positions, self.books.batch or 0
        first = self.books.columns - remove  # the first column that goes
        texts = self._texts_without(first, rows)
        recents: dict[tuple[int, int], int] = {}
        for ring in (s for layer in self.kept for s in layer.plan.storages if isinstance(s, Ring)):
            recents[ring.kind] = max(recents.get(ring.kind, 0), ring.recent)
        for number, (sink, slots) in enumerate(self.kept[0].plan.rings):
            kept = at.rings[2 * number][:rows]
            start = (texts - (recents[sink, slots] - 1)).clamp(min=sink).unsqueeze(1)
            there = ((kept >= start) & (kept < texts.unsqueeze(1))).sum(dim=1)
            missing = int(((texts - start.squeeze(1)).clamp(min=0) - there).max())
            if missing > 0:
                room = slots - sink - recents[sink, slots] + missing
                raise SparseCacheError(
                    f"{remove} tokens cannot be taken back: a ring of {slots} slots has overwritten what would be visible "
                    f"again. Build the cache with rollback={room} or more. It holds what it held before"
                )
        for layer in self.kept:
            layer.restore_tails(remove)
        for known, columns in zip(at.rings[::2], at.rings[1::2], strict=True):
            gone = known >= torch.nn.functional.pad(texts, (0, self.max_batch - rows)).unsqueeze(1)
            known.masked_fill_(gone, -1)
            columns.masked_fill_(gone, -1)
        if at.page_texts is not None:
            at.page_texts[:, first:] = -1
        at.texts[:rows] = texts
        at.columns.sub_(remove)
        for rope in at.stream[:1]:
            rope.sub_(remove)
        at.choose_anew()
        self.books.columns = first

    def _texts_without(self, first: int, rows: int) -> Tensor:
        """The text lengths ``[rows]`` without the columns from ``first`` on."""
        at = self.positions
        if at.page_texts is not None:
            return (at.page_texts[:rows, :first] >= 0).sum(dim=1)
        gone = [(table[:rows] >= first).sum(dim=1) for table in at.rings[1::2]]
        smallest = min(table.shape[1] for table in at.rings)
        if self.books.columns - first > smallest:
            raise SparseCacheError(
                f"{self.books.columns - first} tokens cannot be taken back from rings of {smallest} slots. It holds what it "
                "held before"
            )
        return at.texts[:rows] - torch.stack(gone).amax(dim=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` goes on from what row ``beam_idx[i]`` held: beam search."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one after the other. Raises ``ValueError`` beyond ``max_batch`` rows."""
        rows = self.books.batch or 0
        self._select(torch.arange(rows).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if rows.numel() > self.max_batch:
            raise ValueError(
                f"the cache was built with max_batch={self.max_batch}, got {rows.numel()} sequences: build it with a larger "
                "max_batch"
            )
        held = self.books.batch or 0
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < max(held, 1):
            raise ValueError(f"the cache holds {held} sequences, and the rows {rows.tolist()} are not all among them")
        rows = rows.to(self.positions.columns.device)
        for part in self.parts(max(held, rows.numel())).values():
            if part.dim():
                part[: rows.numel()] = part.index_select(0, rows)
        self.positions.choose_anew()
        self.books.batch = rows.numel() or None

    def parts(self, rows: int, columns: int | None = None) -> dict[str, Tensor]:
        """What the cache holds, as views: positions, keys and values of so many rows and columns (those in use if None)."""
        at, columns = self.positions, self.books.columns if columns is None else columns
        parts = {"texts": at.texts[:rows]}
        if at.page_texts is not None:
            parts["page_texts"] = at.page_texts[:rows, :columns]
        if at.stream:
            parts |= {"rope": at.stream[0], "offsets": at.stream[1][:rows]}
        parts |= {f"ring_{number}": table[:rows] for number, table in enumerate(at.rings)}
        for layer in self.kept:
            for number, buffer in enumerate(layer.buffers):
                storage = layer.plan.storages[number // 2]
                by_column = isinstance(storage, Pages) and storage.forms is None
                parts[f"layer_{layer.plan.layer}_{number}"] = buffer[:rows, :, :columns] if by_column else buffer[:rows]
            for number, (part, tokens) in enumerate(layer.encoded()):
                parts[f"layer_{layer.plan.layer}_code_{number}"] = part[:rows, :, : -(-columns // tokens)]
            for number, (digest, page) in enumerate(layer.digests()):
                parts[f"layer_{layer.plan.layer}_digest_{number}"] = digest[:rows, :, : -(-columns // page)]
        return parts

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write what the cache holds to a safetensors file, to go on from the same prompt later."""
        serialization.save(self, path)

    def load(self, path: str | Path) -> None:
        """Read ``save`` back into a cache of the same model, policy and mode, of any ``max_length`` that is enough.

        Raises ``ValueError`` for files that are broken or belong to another cache; the cache then holds what it held before.
        """
        serialization.load(self, path)
