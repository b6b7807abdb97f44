"""SparseCache: a transformers cache that stores only what its policy can still see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from sparse_compile.cache import serialization
from sparse_compile.cache.crop import remove_last
from sparse_compile.cache.device_positions import DevicePositions
from sparse_compile.cache.host_state import HostState
from sparse_compile.cache.kv_format import ByLayer, check_formats, formats_of
from sparse_compile.cache.layer import SparseCacheLayer
from sparse_compile.cache.origin import Origin
from sparse_compile.cache.page_buffers import Selection
from sparse_compile.cache.planning import Geometry, check_sizes, dtype_of, plan_layers
from sparse_compile.cache.rope import in_cache_positions
from sparse_compile.masks import Mask
from sparse_compile.passes.ops.cache.cache_update import SparseCacheError
from sparse_compile.passes.storage.layer_plan import LayerPlan
from sparse_compile.passes.torch_private import mark_static, real_tensors
from sparse_compile.policy import Policy, as_policy


class SparseCache(Cache):
    """A KV cache whose memory follows the policy: ``model.generate(..., past_key_values=cache)`` on a compiled model.

    A KV head whose masks see only a sink and a window stores those tokens in a ring. Every other head stores all tokens in
    pages. The cache derives this from the masks of prefill and decode together: those of the model (sliding windows in its
    config) and those of the policy. Compile the model with the same policy or with none. The masks of both the cache and the
    compiled policy apply.

    ``max_length`` is the maximum number of tokens of a sequence, prompt and padding included. The constructor allocates all
    memory, for ``max_batch`` sequences, in ``dtype`` (default: the config's) on ``device``. A ring holds the sink, the window
    and ``rollback`` more tokens, rounded up to whole pages of ``page_size`` tokens. ``crop`` can therefore remove ``rollback``
    tokens even from a full ring.

    A model with latent attention (DeepSeek) caches one narrow vector for each token, from which it computes the keys and values
    of all heads. Such a cache keeps the vectors of all tokens, whatever the policy shows of them, and cannot be quantized.

    ``kv`` quantizes pages to ``"int8"``, ``"fp8"``, ``"int4"`` or a ``KVFormat``. It is one format for all layers, or a
    sequence with one entry per layer, where an entry may be a sequence with one format per KV head. Decode steps read
    quantized pages directly. On CPU, and under masks and score mods that only FlexAttention supports, each call dequantizes
    them first. The new tokens of a prompt attend to one another unquantized, and to earlier tokens as they are stored. Rings
    are small and stay in ``dtype``. With ``debug``, numbers that are not finite raise ``ValueError`` when they are quantized.
    ``debug`` waits for the device and rules out CUDA graphs, and the cache needs a ``reset`` after such an error.

    | ``mode``        | What a query of a prompt chunk sees                                                          |
    |-----------------|----------------------------------------------------------------------------------------------|
    | `strict`        | exactly what the mask shows, however the prompt is cut into chunks                           |
    | `chunk_relaxed` | its own chunk, and of earlier tokens those that the mask shows to the last one before the    |
    |                 | chunk; the result depends on the chunks (DuoAttention's published prefill)                   |

    With ``cache_positions`` a query is placed at its position in the cache instead of in the text (StreamingLLM,
    https://arxiv.org/abs/2309.17453). The sink is never farther from a query than the cache is large, and texts may be
    longer than the model's largest position. This needs rotary position embeddings, and a policy under which every head drops
    keys. ``max_length`` may then be as large as you like if the model is called token by token or chunk by chunk.
    ``generate`` and padding build masks over all of it.

        >>> policy = sc.policies.streaming_llm(sink=4, recent=28)
        >>> cache = sc.SparseCache(model.config, policy, max_length=4096)
        >>> model = sc.compile(model, policy, inner="eager")
        >>> model.generate(tokens, max_new_tokens=2, past_key_values=cache).shape
        torch.Size([1, 10])
        >>> cache.nbytes < cache.dense_nbytes / 10
        True

    The constructor raises ``ValueError`` or ``TypeError`` for invalid sizes, policies and configs. A cache in use raises
    ``SparseCacheError`` without the backend, beyond ``max_length``, and where a ring no longer holds tokens that are needed. It
    raises ``ValueError`` for tensors of another model, dtype or device, and for a larger batch. The cache is unchanged after
    these errors. Graphs that read a cache have no gradients, and a backward pass through them raises ``SparseCacheError``.
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
        dtype = dtype_of(dtype or getattr(config, "dtype", None) or torch.get_default_dtype())
        device = torch.device(device) if device is not None else torch.get_default_device()
        self._built = partial(
            SparseCache, config, policy, max_length=max_length, max_batch=max_batch, page_size=page_size, dtype=dtype,
            device=device, mode=mode, cache_positions=cache_positions, rollback=rollback, kv=kv, debug=debug,
        )  # fmt: skip
        self.origin = Origin()
        self.geometry, self.policy = Geometry.of(config), as_policy(policy)
        self.max_length, self.max_batch, self.mode = max_length, max_batch, mode
        sizes = {"max_length": max_length, "page_size": page_size, "rollback": rollback}
        self.page_size, self.rollback = page_size, rollback
        self.formats = formats = formats_of(kv, len(self.geometry.masks), self.geometry.kv_heads)
        check_formats(formats, device)
        with real_tensors():  # planning evaluates masks, even while the surrounding code runs on fake tensors
            plans = plan_layers(
                self.geometry, self.policy, **sizes, mode=mode, formats=formats, debug=debug, moving=cache_positions
            )
        frequencies: list[Tensor | None] = [None] * len(plans)
        if cache_positions and self.geometry.is_latent:
            raise ValueError(
                "cache_positions=True moves keys in a ring, but this model caches latent vectors of every token: leave it out"
            )
        if cache_positions:
            plans, frequencies = in_cache_positions(plans, config, self.geometry.key_dim, device)
        has_pages = any(storage.holds_every_key for plan in plans for storage in plan.storages)
        selects = any(storage.selection is not None for plan in plans for storage in plan.storages)
        columns = plans[0].columns
        sizes_of_pages = columns, columns if has_pages else 0
        self.positions = DevicePositions(
            max_batch, *sizes_of_pages, plans[0].rings, device, moving=cache_positions, selects=selects
        )
        self.host_state = HostState(max_length, max_batch, len(plans), overwrites=selects or bool(plans[0].rings))
        # The same objects as ``layers``, with their own type.
        self.cached_layers = self._build_layers(plans, frequencies, dtype, device)
        layers: list[Any] = list(self.cached_layers)
        super().__init__(layers=layers)
        self.positions.columns.sparse_cache_host_state = self.host_state  # type: ignore[attr-defined]  # read by the backend
        for tensor in self._tensors():
            mark_static(tensor)  # otherwise a second cache of another size would make the sizes of both dynamic

    def _build_layers(
        self, plans: Sequence[LayerPlan], frequencies: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device
    ) -> tuple[SparseCacheLayer, ...]:
        """Allocate what every layer holds."""
        dims = self.geometry.key_dim, self.geometry.value_dim
        selection = Selection(plans, self.geometry.key_dim, self.max_batch, dtype, device)

        def allocate(shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
            # ``zeros``, not ``empty``: a masked value enters the sum with weight 0, and 0 * NaN is NaN.
            return [torch.zeros((self.max_batch, *shape), dtype=kind, device=device) for shape, kind in shapes]

        layers = []
        for plan, turns in zip(plans, frequencies, strict=True):
            slots = [(len(storage.heads), storage.buffer_slots) for storage in plan.storages]
            layer = SparseCacheLayer(
                plan,
                allocate([((*size, dim), dtype) for size in slots for dim in dims]),
                self.positions,
                self.host_state,
                quantized=allocate([part for storage in plan.storages for part in storage.quantized_shapes(dims, dtype)]),
                frequencies=turns,
                own=selection.own(plan),
                selection=selection.used(plan),
            )
            layers.append(layer)
        return tuple(layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values to a layer. Models call this; see ``SparseCacheLayer.update``."""
        if layer_idx >= len(self.cached_layers) and not torch.compiler.is_compiling():
            raise ValueError(
                f"the cache has {len(self.cached_layers)} layers, got layer {layer_idx}: build it from this model's config"
            )
        # While a graph is traced, a layer beyond the last maps to the last one, and the kv pass rejects the graph.
        return self.cached_layers[min(layer_idx, len(self.cached_layers) - 1)].update(key_states, value_states)

    # -- contents ---------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """The allocated bytes: keys and values with their scales, offsets and tails, page summaries and positions."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def dense_nbytes(self) -> int:
        """The bytes of a dense cache of the same ``max_length`` and ``max_batch``, as ``StaticCache`` allocates it."""
        geometry, each = self.geometry, self.cached_layers[0].dtype.itemsize
        token = len(self.cached_layers) * geometry.kv_heads * (geometry.key_dim + geometry.value_dim) * each
        return token * self.max_batch * self.max_length

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which keys and values are stored unless they are quantized."""
        return self.cached_layers[0].dtype

    @property
    def kv_formats(self) -> set[str]:
        """The formats of quantized keys and values; empty if nothing is quantized."""
        forms = [form for layer in self.cached_layers for storage in layer.plan.storages for form in storage.forms or ()]
        return {form.kind for form in forms if form.kind}

    @property
    def is_chunkable(self) -> bool:
        """Whether a prompt may be cut into chunks without any change of its result."""
        return self.mode == "strict" and not self.cached_layers[0].plan.rotation

    @property
    def is_compileable(self) -> bool:
        """Whether masks are built for all columns: True in a traced model, whose masks are recognized and never built.

        Outside of graphs it is False, because ``generate`` would otherwise build a mask of queries times columns there.
        """
        return torch.compiler.is_compiling()

    def _tensors(self) -> list[Tensor]:
        frequencies = {id(layer.stream[2]): layer.stream[2] for layer in self.cached_layers if layer.stream}
        return [
            *self.positions.tensors(),
            *frequencies.values(),
            *(tensor for layer in self.cached_layers for tensor in layer.tensors()),
        ]

    def __repr__(self) -> str:
        held = f"{self.host_state.columns} of {self.max_length} tokens, {self.nbytes / 2**20:.1f} MiB"
        return f"SparseCache({held}, dense {self.dense_nbytes / 2**20:.1f} MiB, {len(self.layers)} layers)"

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The column of the next token: a tensor while a graph is traced, an int otherwise."""
        return self.positions.columns if torch.compiler.is_compiling() else self.host_state.columns

    # -- changes ----------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Empty the cache. Its tensors keep their addresses."""
        self.positions.clear()
        self.host_state.forget()
        self.origin.forget()

    def resized(self, **sizes: Any) -> SparseCache:
        """Return an empty cache with the same arguments, but for ``sizes``, such as ``max_length`` and ``max_batch``.

        >>> cache = sc.SparseCache(model.config, max_length=64)
        >>> cache.resized(max_length=128).max_length
        128
        """
        return self._built(**sizes)

    def reserve(self, max_length: int) -> None:
        """Make room for texts of ``max_length`` tokens. The contents stay, but their memory moves, so graphs are compiled anew.

        ``generate`` calls this for caches that it has made itself. Quantized pages of heads that have a ring in the longer
        cache are dequantized. Raises ``SparseCacheError`` if the longer cache needs tokens that this one does not hold.
        """
        if max_length <= self.max_length:
            return
        self.host_state.check_whole()
        larger = self.resized(max_length=max_length)
        if lacking := serialization.copy(self, larger):
            raise SparseCacheError(
                f"a cache for {self.max_length} tokens cannot grow to {max_length}, because it lacks tokens that {lacking} "
                f"would need: build it for the longest text, with max_length={max_length}. The cache is unchanged"
            )
        larger.origin = self.origin
        self.__dict__.update(larger.__dict__)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens: after ``crop(-3)`` it is as if the last three had never been appended.

        Raises ``SparseCacheError`` if a ring has already overwritten tokens that would be visible again. The constructor's
        ``rollback`` makes room for them. Raises ``ValueError`` for positive numbers and for more tokens than the cache holds.
        """
        remove = -tokens_to_remove
        if remove < 0:
            raise ValueError(f"crop needs a number of at most 0, got {tokens_to_remove}: call crop(-n) to remove n tokens")
        if remove > self.host_state.columns:
            raise ValueError(f"the cache holds {self.host_state.columns} tokens, so {remove} cannot be removed: remove fewer")
        if remove == self.host_state.columns:
            self.reset()
        if remove == 0 or self.host_state.columns == 0:
            return
        self.host_state.check_whole()
        remove_last(self, remove)

    @property
    def is_verifying(self) -> bool:
        """Whether the new tokens are a few that speculative decoding verifies."""
        return self.cached_layers[0].is_verifying

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """A context in which the new tokens are a few that speculative decoding verifies: they see what a prompt would see."""
        for layer in self.cached_layers:
            layer.set_verifying(True)
        try:
            yield
        finally:
            for layer in self.cached_layers:
                layer.set_verifying(False)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``i`` continue from the contents of row ``beam_idx[i]``, for beam search."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in that order. Without any row, the cache is empty."""
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, with its copies side by side. Raises ``ValueError`` beyond ``max_batch`` rows."""
        rows = self.host_state.batch or 0
        self._select(torch.arange(rows).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if rows.numel() > self.max_batch:
            raise ValueError(
                f"the cache was built with max_batch={self.max_batch}, got {rows.numel()} sequences: build it with a larger "
                "max_batch"
            )
        held = self.host_state.batch or 0
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < max(held, 1):
            raise ValueError(f"the cache holds {held} sequences, got rows {rows.tolist()}: pass rows that it holds")
        self.host_state.check_whole()
        if not rows.numel():
            self.reset()
            return
        rows = rows.to(self.positions.columns.device)
        for part in self.parts(max(held, rows.numel())).values():
            if part.dim():
                part[: rows.numel()] = part.index_select(0, rows)
        self.positions.padding.select(rows)
        self.positions.choose_anew()
        self.host_state.batch = rows.numel()

    def parts(self, rows: int, columns: int | None = None) -> dict[str, Tensor]:
        """The contents as named views: positions, keys and values of the first rows and columns (None: all columns in use)."""
        at, columns = self.positions, self.host_state.columns if columns is None else columns
        parts = {"texts": at.texts[:rows]}
        if at.page_texts is not None:
            parts["page_texts"] = at.page_texts[:rows, :columns]
        if at.stream:
            parts |= {"rope": at.stream[0], "offsets": at.stream[1][:rows]}
        parts |= {f"ring_{number}": table[:rows] for number, table in enumerate(at.rings)}
        for layer in self.cached_layers:
            for number, buffer in enumerate(layer.buffers):
                storage = layer.plan.storages[number // 2]
                by_column = storage.columns_are_slots
                parts[f"layer_{layer.plan.layer}_{number}"] = buffer[:rows, :, :columns] if by_column else buffer[:rows]
            for number, (part, tokens) in enumerate(layer.quantized_parts()):
                parts[f"layer_{layer.plan.layer}_code_{number}"] = part[:rows, :, : -(-columns // tokens)]
            for number, (summary, page) in enumerate(layer.summaries()):
                parts[f"layer_{layer.plan.layer}_digest_{number}"] = summary[:rows, :, : -(-columns // page)]
        return parts

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the contents of the cache to a safetensors file, to continue from the same prompt later.

        If a model of ``sparse_compile.compile`` uses the cache, the file gets a fingerprint of its weights: a hash of some
        values of each. The file of a cache that only models of ``torch.compile`` have used has none.
        """
        serialization.save(self, path)

    def load(self, path: str | Path) -> None:
        """Read a file of ``save`` into a cache that was built alike. ``max_length`` and ``max_batch`` may differ.

        Raises ``FileNotFoundError`` if there is no file, and ``ValueError`` if it is broken, holds more than fits, or belongs
        to a cache of another model, policy, mode, dtype or kv format. The cache is then unchanged. Quantized caches and those
        that select pages or use ``cache_positions`` also need the same ``page_size`` and ``rollback``.

        A file with a fingerprint of weights is refused with ``ValueError`` if the model that uses this cache has other weights.
        If no model has used the cache yet, the first one that does raises ``SparseCacheError`` instead. A file without a
        fingerprint is taken as it is.
        """
        serialization.load(self, path)
