"""Serve static masks with vLLM's FlexAttention backend, which takes a mask and a hint of live blocks from each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backends.flex_attention import BlockSparsityHint, FlexAttentionBackend, FlexAttentionImpl
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from sparse_compile.masks import Mask, per_head
from sparse_compile.masks.analysis import Past
from sparse_compile.vllm.streaming import StreamingSpec


class MaskedImpl(FlexAttentionImpl):
    """vLLM's FlexAttention, with what a CPU needs besides: writing new keys, and tables of blocks for torch's C++ templates."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend as vLLM does. On a CPU the tables of blocks are built here, and vLLM finds them done."""
        if (
            current_platform.is_cpu()
            and attn_metadata is not None
            and attn_metadata.logical_mask_mod is not layer.logical_mask_mod
        ):
            attn_metadata.logical_mask_mod = layer.logical_mask_mod
            attn_metadata.block_sparsity_hint = layer.block_sparsity_hint
            attn_metadata.sliding_window = self.sliding_window
            attn_metadata.mask_mod = attn_metadata.get_mask_mod()
            attn_metadata.block_mask = _for_cpu(attn_metadata._build_block_mask_direct())
        out: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        return out

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Write keys and values ``[tokens, KV heads, D]`` to their slots. A negative slot is padding."""
        if not current_platform.is_cpu():
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)  # [blocks, tokens, KV heads, D]
        real = slot_mapping >= 0
        block, offset = slot_mapping[real] // keys.shape[1], slot_mapping[real] % keys.shape[1]
        keys[block, offset] = key[: len(real)][real]
        values[block, offset] = value[: len(real)][real]


class MaskedBackend(FlexAttentionBackend):
    """vLLM's FlexAttention for layers that bring a mask."""

    @staticmethod
    def get_impl_cls() -> type[MaskedImpl]:
        """Return the class that runs a layer."""
        return MaskedImpl


class OneHeadBackend(MaskedBackend):
    """The same for layers of one KV head. The order of heads and tokens in a block is then one and the same."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Return the layouts that FlexAttention reads, and those that equal them for one head."""
        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)


class MaskedAttention(Attention):
    """An attention layer whose query heads have masks, and which stores only the tokens that they see.

    ``logical_mask_mod`` and ``block_sparsity_hint`` are the attributes that vLLM's FlexAttention reads.
    """

    def __init__(self, *args: Any, mask: LayerMask, past: Past | None, num_kv_heads: int, **kwargs: Any) -> None:
        backend = OneHeadBackend if num_kv_heads == 1 else MaskedBackend
        super().__init__(*args, num_kv_heads=num_kv_heads, attn_backend=backend, **kwargs)
        self.logical_mask_mod = mask.mask_mod
        self.block_sparsity_hint = mask.hint
        self.past = past

    def get_kv_cache_spec(self, vllm_config: Any) -> AttentionSpec:
        """Return what the layer stores: all tokens, or a sink and a window."""
        kept = {
            "block_size": vllm_config.cache_config.block_size,
            "num_kv_heads": self.num_kv_heads,
            "head_size": self.head_size,
            "head_size_v": self.head_size_v,
            "dtype": self.kv_cache_torch_dtype,
        }
        if self.past is None:
            return FullAttentionSpec(**kept)
        return StreamingSpec(**kept, sliding_window=self.past.recent, sink=self.past.sink)


def _for_cpu(blocks: BlockMask) -> BlockMask:
    """Return the same tables as torch's C++ templates take them: with room for every block of the cache, and full blocks.

    No block is marked as full. The template for few queries does not compile without a table of full blocks (torch 2.13).
    """
    (_, keys), (_, size) = blocks.seq_lengths, blocks.BLOCK_SIZE
    room = max(0, -(-keys // size) - blocks.kv_indices.shape[-1])
    indices = torch.nn.functional.pad(blocks.kv_indices, (0, room))
    return BlockMask.from_kv_blocks(
        blocks.kv_num_blocks,
        indices,
        torch.zeros_like(blocks.kv_num_blocks),
        torch.zeros_like(indices),
        BLOCK_SIZE=blocks.BLOCK_SIZE,
        mask_mod=blocks.mask_mod,
        seq_lengths=blocks.seq_lengths,
        compute_q_blocks=False,
    )


class LayerMask:
    """The mask of a layer as vLLM takes it.

    Layers with equal masks should share one object: vLLM builds block tables again where the next layer has another one.
    """

    def __init__(self, masks: tuple[Mask, ...]) -> None:
        whole = masks[0] if len(set(masks)) == 1 else per_head(masks)
        self.mask_mod = _written_out(whole)  # one object, because vLLM compares it with `is`
        self.hint = BlockSparsityHint(_live_blocks(whole))


def _written_out(mask: Mask) -> Callable[..., Any]:
    """Return the mask as a function whose numbers are literals.

    vLLM compiles its kernel for every mask, by the same code. Dynamo would take numbers that differ between masks for dynamic
    sizes, with which torch's C++ template does not compile (torch 2.13).
    """
    graph = torch.fx.symbolic_trace(lambda b, h, q_idx, kv_idx: mask.__call__(b, h, q_idx, kv_idx))
    written: Callable[..., Any] = graph.forward
    return written


def _live_blocks(mask: Mask) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return a function that says which blocks of keys a query of a block may see, from the bounds of the mask."""

    def hint(query_block: Tensor, key_block: Tensor, size: int) -> Tensor:
        blocks, place = torch.unique(query_block.flatten().long(), return_inverse=True)  # bounds need ascending runs
        start = key_block.flatten().long() * size
        keys = mask.bounds(blocks * size, blocks * size + size - 1).maybe
        live = keys.overlap(start, start + size) > 0  # [..., blocks of queries, blocks of keys]
        return live.reshape(-1, len(blocks), len(start)).any(dim=0)[place]

    return hint
