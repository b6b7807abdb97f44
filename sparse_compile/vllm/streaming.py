"""Store a sink and a window in vLLM's paged cache: blocks between them go back to the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


@dataclass(frozen=True, kw_only=True)
class StreamingSpec(SlidingWindowSpec):
    """The cache of layers that see the first ``sink`` and the last ``sliding_window`` tokens."""

    sink: int = 0

    @property
    def sink_blocks(self) -> int:
        """The number of blocks that hold the sink."""
        return int(cdiv(self.sink, self.block_size))

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Return the most blocks that one request holds: those of the window, as vLLM counts them, and those of the sink."""
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return int(min(window + self.sink_blocks, cdiv(max_model_len, self.block_size) + 1))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Return whether all layers of a group keep the same sink and window."""
        own = (self.sliding_window, self.sink)
        specs = kv_cache_specs.values()
        return all(isinstance(spec, StreamingSpec) and (spec.sliding_window, spec.sink) == own for spec in specs)


class StreamingManager(SlidingWindowManager):
    """Hand out and take back the blocks of a ``StreamingSpec``, as ``SlidingWindowManager`` does, but keep the sink."""

    def __init__(self, kv_cache_spec: StreamingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.sink_blocks = kv_cache_spec.sink_blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks between the sink and the window."""
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.sink_blocks, skipped)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Count the cached blocks of the sink too, which leave the free blocks when a request takes them."""
        count = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        return int(count + self._get_num_evictable_blocks(new_computed_blocks[: min(self.sink_blocks, skipped)]))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take the cached blocks of a prefix, those of the sink included, which a sliding window would leave out."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        skipped = self.get_num_skipped_tokens(num_local_computed_tokens + num_external_computed_tokens) // self.block_size
        kept = new_computed_blocks[: min(self.sink_blocks, skipped)]
        self.block_pool.touch(kept)
        self.req_to_blocks[request_id][: len(kept)] = kept

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: StreamingSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Find the longest cached prefix. It needs the blocks of its window, and those of the sink."""
        found, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block=drop_eagle_block,
            alignment_tokens=alignment_tokens,
            **kwargs,
        )
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        for number in range(min(kv_cache_spec.sink_blocks, len(found[0]))):
            cached = block_pool.get_cached_block(hashes[number], kv_cache_group_ids)
            if not cached:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, cached, strict=True):
                blocks[number] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, alignment_tokens: int | None, kv_cache_spec: StreamingSpec, **kwargs: Any
    ) -> list[bool] | None:
        """Say which blocks a later request can reach, the sink included. None means all of them."""
        reached: list[bool] | None = super().reachable_block_mask(
            start_block, end_block, alignment_tokens, kv_cache_spec, **kwargs
        )
        if reached is not None:
            for block in range(start_block, min(end_block, kv_cache_spec.sink_blocks)):
                reached[block - start_block] = True
        return reached


def register_streaming() -> None:
    """Register the spec and its manager with vLLM. A second call changes nothing."""
    KVCacheSpecRegistry._ensure_registered()  # vLLM registers its own specs only while there are none
    KVCacheSpecRegistry.register(StreamingSpec, StreamingManager, uniform_type_base_spec=StreamingSpec)
