"""Plan a cache: derive from the masks of model and policy which past tokens each KV head needs, and choose its storage."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparse_compile.cache.kv_format import KVFormat
from sparse_compile.cache.page_buffers import selecting_pages
from sparse_compile.masks import Mask, causal, chunked, sliding_window
from sparse_compile.masks.analysis import Past
from sparse_compile.masks.operators import union
from sparse_compile.masks.selection.budget import check_budget, check_pages
from sparse_compile.masks.selection.page_topk import PageTopK, offered, selector_of, static_part
from sparse_compile.passes.ops.block_tables import BLOCK
from sparse_compile.passes.storage.codec import Format
from sparse_compile.passes.storage.layer_plan import MODES, LayerPlan, PageStorage, RingStorage, Storage, needed_past
from sparse_compile.policy import Policy

Forms = tuple[Format, Format]
KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Geometry:
    """The facts that a cache needs of a model: head counts, head sizes, and the mask of each attention layer per its config."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    masks: tuple[Mask, ...]
    is_latent: bool = False  # keys and values of all heads are computed from one vector for each token, which is cached

    @staticmethod
    def of(config: Any) -> Geometry:
        """Read a transformers config. Raises ``ValueError`` for models with layers that are not attention."""
        config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
        if not (isinstance(layers, int) and isinstance(heads, int)):
            raise ValueError(
                "a SparseCache needs a config with num_hidden_layers and num_attention_heads, got "
                f"{type(config).__name__}: pass model.config"
            )
        if getattr(config, "alibi", False):
            raise ValueError(
                f"a SparseCache needs a model without alibi, got {type(config).__name__}(alibi=True), whose code makes "
                "biases for the tokens of its mask and not for all columns of a cache: use a DynamicCache"
            )
        layers -= getattr(config, "num_kv_shared_layers", 0) or 0
        if _caches_latents(config):
            return Geometry(heads, 1, config.kv_lora_rank, config.qk_rope_head_dim, _masks(config, layers), is_latent=True)
        return Geometry(heads, _kv_heads(config, heads), *_dims(config, heads), _masks(config, layers))


def _caches_latents(config: Any) -> bool:
    """Whether a model of this config caches latent vectors (DeepSeek), as its code in transformers says by ``expand_kv``.

    Older code for the same configs caches the keys and values of all heads.
    """
    if not all(isinstance(getattr(config, name, None), int) for name in ("kv_lora_rank", "qk_rope_head_dim")):
        return False
    try:
        code = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    except ImportError:
        return False
    return any(isinstance(member, type) and hasattr(member, "expand_kv") for member in vars(code).values())


def _kv_heads(config: Any, heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):  # Falcon
        return 1
    named = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return named if isinstance(named, int) else heads


def _dims(config: Any, heads: int) -> tuple[int, int]:
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    parts = getattr(config, "qk_nope_head_dim", None), getattr(config, "qk_rope_head_dim", None)
    if isinstance(parts[0], int) and isinstance(parts[1], int):  # multi-head latent attention
        return parts[0] + parts[1], config.v_head_dim
    return dim, dim


def _masks(config: Any, layers: int) -> tuple[Mask, ...]:
    """The mask of each layer, by the rules with which transformers sizes its own caches."""
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "chunked_attention" if chunk else "full_attention"] * layers
    unknown = sorted(set(kinds[:layers]) - KINDS)
    if unknown:
        raise ValueError(f"a SparseCache supports attention layers only, but the model has layers of kind {unknown[0]!r}")
    masks: dict[str, Mask] = {"full_attention": causal}
    if window:
        masks["sliding_attention"] = causal & sliding_window(window)
    if chunk:
        masks["chunked_attention"] = causal & chunked(chunk)
    return tuple(masks.get(kind, causal) for kind in kinds[:layers])


def plan_layers(
    geometry: Geometry,
    policy: Policy | None,
    *,
    max_length: int,
    page_size: int,
    rollback: int,
    mode: str,
    formats: list[list[KVFormat]],
    debug: bool,
    moving: bool = False,
) -> tuple[LayerPlan, ...]:
    """Plan each layer: a ring for KV heads whose masks see only a sink and a window, pages in their formats for all others.

    A ring as large as the cache would be pages. With ``moving``, for queries at cache positions, it stays a ring, and heads
    share one only if they see equally much, because its size is the largest position.
    """
    if mode not in MODES:
        raise ValueError(f"mode needs to be one of {', '.join(MODES)}, got {mode!r}")
    if policy is not None:
        policy.check(len(geometry.masks), geometry.heads, geometry.kv_heads)
        if policy.names_modules():
            raise ValueError(
                "a SparseCache identifies layers by number, but the policy names modules: use layer indices or ranges"
            )
    columns = -(-max_length // page_size) * page_size
    plans: list[LayerPlan] = []
    for layer, model in enumerate(geometry.masks):
        prefill, decode = (None if policy is None else policy.mask_for("", layer, phase) for phase in ("prefill", "decode"))
        for mask in (prefill, decode):
            if mask is not None:
                for part in (offered(mask), static_part(mask)):
                    part.check(part.sizes()[0], geometry.heads, 1, max_length)
        forms = [one.forms(geometry.key_dim, geometry.value_dim, page_size) for one in formats[layer]]
        sizes = max_length, page_size, rollback
        storages = _storages(geometry, model, [prefill, decode], forms, sizes, mode, plans, moving=moving)
        last = layer == len(geometry.masks) - 1
        plans.append(LayerPlan(layer, last, columns, (), storages, model, prefill, decode, mode, debug=debug))
    rings = dict.fromkeys(s.ring_kind for plan in plans for s in plan.storages if s.ring_kind is not None)
    return tuple(replace(plan, rings=tuple(rings)) for plan in plans)


def _storages(
    geometry: Geometry,
    model: Mask,
    policies: list[Mask | None],
    forms: list[Forms | None],
    sizes: tuple[int, int, int],
    mode: str,
    before: list[LayerPlan],
    *,
    moving: bool,
) -> tuple[Storage, ...]:
    max_length, page_size, rollback = sizes
    group = geometry.heads // geometry.kv_heads
    pages: dict[tuple[PageTopK | None, Forms | None], dict[int, Mask]] = {}
    rings: dict[tuple[int, int, int], list[tuple[int, int]]] = {}  # (sink, slots, frame) -> [(head, recent)]
    most = -(-max_length // page_size) * page_size
    for head in range(geometry.kv_heads):
        queries = range(head * group, (head + 1) * group)
        prefill, decode = (
            [model if policy is None else model & policy.for_head(query, geometry.heads) for query in queries]
            for policy in policies
        )
        past = _union([needed_past(mask, mode, max_length) for mask in {*prefill, *decode}])
        # A head that sees nothing has a slot too, because its new keys are written somewhere.
        slots = most if past is None else -(-(past.sink + max(past.recent, 1) + rollback) // page_size) * page_size
        in_prefill, whole = _selector(union(prefill), max_length, prefill=True), union(decode)
        selector = _selector(whole, max_length, prefill=False)
        if geometry.is_latent:
            _check_latent(in_prefill if selector is None else selector, forms[head])
        if in_prefill is not None or selector is not None or geometry.is_latent:
            past = None  # a head that selects pages stores pages, and latent vectors are kept for all heads
        if past is None or (slots >= most and not moving):
            pages.setdefault((selector, forms[head]), {})[head] = whole
        else:
            rings.setdefault((past.sink, slots, past.recent if moving else 0), []).append((head, past.recent))
    storages: list[Storage] = []
    for (selector, form), heads in pages.items():
        kept = PageStorage(tuple(heads), most)
        if selector is not None:
            kept = selecting_pages(selector, heads, most, page_size, len(before), before)
        # Two pages, so that after a page has been cropped the tail still holds the group that is being filled.
        tail = 2 * page_size + -(-rollback // page_size) * page_size
        storages.append(kept if form is None else replace(kept, forms=form, tail=tail))
    for (sink, slots, _), members in rings.items():
        numbers, recent = zip(*members, strict=True)
        storages.append(RingStorage(tuple(numbers), slots, sink, max(recent)))
    return tuple(storages)


def _check_latent(selector: PageTopK | None, forms: Forms | None) -> None:
    """Raise ``ValueError`` for what latent vectors cannot do, because they are no keys."""
    if selector is not None:
        raise ValueError(
            f"{selector} scores the keys in a cache, but this model caches latent vectors: use a policy without page_topk"
        )
    if forms is not None:
        raise ValueError("kv quantizes keys and values, but this model caches latent vectors: leave kv out")


def _union(pasts: list[Past | None]) -> Past | None:
    known = [past for past in pasts if past is not None]
    if len(known) < len(pasts):
        return None
    return Past(max(past.sink for past in known), max(past.recent for past in known))


def check_sizes(max_length: int, max_batch: int, page_size: int, rollback: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` for sizes that a cache cannot have."""
    for name, value, least in (
        ("max_length", max_length, 1),
        ("max_batch", max_batch, 1),
        ("page_size", page_size, 1),
        ("rollback", rollback, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} needs an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} needs to be at least {least}, got {value}")


def dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    """Return a floating point type; a config that was saved names it as text. Raises ``ValueError`` for anything else."""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not (isinstance(named, torch.dtype) and named.is_floating_point):
        raise ValueError(f"a SparseCache needs a floating point dtype, got {dtype}")
    return named


def _selector(whole: Mask, length: int, *, prefill: bool) -> PageTopK | None:
    """The selector of a KV head, or None. Raises ``ValueError`` if its budget, or its pages in a prefill, do not work."""
    selector = selector_of(whole)
    if selector is not None:
        check_budget(selector, whole, length)
        if prefill:
            check_pages(selector, BLOCK, prefill=True)
    return selector
