"""Serve page_topk with the paged kernel of vLLM's CPU platform: decode steps get block tables of the chosen pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionMetadataBuilder, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from sparse_compile.masks import Mask
from sparse_compile.masks.selection.page_topk import PageTopK
from sparse_compile.vllm.selection import Step, choose_pages, decode_steps, one_head_tables, update_summaries


@dataclass
class PagesRead:
    """How many pages the decode steps of a layer have read, and how many there were."""

    read: int = 0
    held: int = 0


class SelectedBuilder(CPUAttentionMetadataBuilder):
    """The builder of the CPU's backend, which also notes the requests that decode."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Build the metadata of a batch. ``decodes`` lists the requests that decode, ``prefills`` all others."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        prefilling = common_attn_metadata.is_prefilling
        count = common_attn_metadata.num_reqs
        metadata.decodes = [] if prefilling is None else (~prefilling[:count]).nonzero().flatten().tolist()
        metadata.prefills = [row for row in range(count) if row not in set(metadata.decodes)]
        return metadata


class SelectedImpl(CPUAttentionBackendImpl):
    """The CPU's attention, in which decode steps read the pages that score best."""

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Write new keys and values, and extend the summaries of their pages."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        slots = get_forward_context().slot_mapping[layer.summaries.layer_name]
        update_summaries(layer.summaries.kv_cache, key, slots, layer.selector.page)

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
        """Attend prompts to all keys and decode steps to the chosen pages."""
        if attn_metadata is None or not attn_metadata.decodes:
            out: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return out
        starts = attn_metadata.query_start_loc.tolist()
        if attn_metadata.prefills:
            rows = attn_metadata.prefills
            tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
            sizes = torch.tensor([0, *(starts[row + 1] - starts[row] for row in rows)]).cumsum(0)
            tables, lengths = attn_metadata.block_table[rows], attn_metadata.seq_lens[rows]
            output[tokens] = self._attend(layer, query[tokens], kv_cache, tables, lengths, sizes)
        steps = decode_steps(attn_metadata.decodes, starts, attn_metadata.seq_lens.tolist())
        tokens = torch.tensor([step.token for step in steps])
        output[tokens] = self._decode(layer, query[tokens], kv_cache, attn_metadata.block_table, steps)
        return output

    def _decode(self, layer: Any, q: Tensor, kv_cache: Tensor, block_table: Tensor, steps: list[Step]) -> Tensor:
        """Attend decode steps ``[steps, heads, D]`` in one launch, each KV head as a request of its own."""
        blocks, heads, size, _ = kv_cache.shape
        described = get_forward_context().attn_metadata[layer.summaries.layer_name].block_table
        by_head = q.unflatten(1, (heads, -1))  # [steps, KV heads, query heads of each, D]
        tables, lengths = [], []
        for number, step in enumerate(steps):
            length, per_block = step.length, layer.summaries.kv_cache.shape[2]
            own = described[step.row, : -(-length // (per_block * layer.selector.page))].long()
            summaries = layer.summaries.kv_cache[own].transpose(0, 1).flatten(1, 2)  # [KV heads, logical pages, 2 * D]
            counts, chosen = choose_pages(by_head[number], summaries, layer.masks, layer.selector, length, size)
            tables.append(one_head_tables(block_table[step.row, : chosen.shape[1]], counts, chosen))
            lengths.append((counts - 1) * size + (length - 1) % size + 1)  # the newest page is the last one
            layer.pages.read += int(counts.sum())
            layer.pages.held += heads * chosen.shape[1]
        width = max(table.shape[1] for table in tables)
        rows = torch.cat([nn.functional.pad(table, (0, width - table.shape[1])) for table in tables])
        view = kv_cache.view(blocks * heads, 1, size, -1)
        each = torch.arange(len(rows) + 1)
        out = self._attend(layer, by_head.flatten(0, 1), view, rows, torch.cat(lengths), each)
        return out.view_as(q)

    def _attend(self, layer: Any, q: Tensor, kv_cache: Tensor, tables: Tensor, lengths: Tensor, starts: Tensor) -> Tensor:
        """Run the CPU's paged kernel for queries ``[tokens, heads, D]`` of the requests that ``starts`` separates."""
        blocks, kv_heads, size, _ = kv_cache.shape
        keys, values = kv_cache.view(blocks, kv_heads, size * 2, -1).chunk(2, dim=2)
        lengths, starts, q = lengths.int(), starts.int(), q.contiguous()
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=q.shape[1],
            num_kv_heads=kv_heads,
            head_dim=self.head_size,
            seq_lens=lengths,
            dtype=q.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=True,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        out = torch.empty_like(q)
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=tables.int().contiguous(),
            softcap=0,
            scheduler_metadata=plan,
            s_aux=None,
            dynamic_causal=None,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return out


class SelectedBackend(CPUAttentionBackend):
    """The CPU's backend for layers that select pages."""

    @staticmethod
    def get_impl_cls() -> type[SelectedImpl]:
        """Return the class that runs a layer."""
        return SelectedImpl

    @staticmethod
    def get_builder_cls() -> type[SelectedBuilder]:
        """Return the class that builds the metadata of a batch."""
        return SelectedBuilder


class SelectedAttention(Attention):
    """An attention layer whose decode steps read the pages that score best. Page summaries are a cache layer beside it.

    vLLM repeats the text of a preempted request as a prompt, and prompts read all pages.
    """

    def __init__(self, *args: Any, masks: tuple[Mask, ...], selector: PageTopK, prefix: str, **kwargs: Any) -> None:
        super().__init__(*args, prefix=prefix, attn_backend=SelectedBackend, **kwargs)
        self.masks, self.selector, self.pages = masks, selector, PagesRead()
        self.summaries = PageSummaries(self, f"{prefix}_summaries")


class PageSummaries(nn.Module, AttentionLayerBase):
    """The page summaries of one attention layer, in blocks of vLLM's cache.

    vLLM counts their memory, and caches and frees them with the prefix that they describe.
    """

    def __init__(self, described: SelectedAttention, prefix: str) -> None:
        super().__init__()
        self.layer_name = prefix
        self.kv_cache = torch.tensor([])
        self.page = described.selector.page
        self.sizes = {
            "num_kv_heads": described.num_kv_heads,
            "head_size": described.head_size,
            "dtype": described.kv_cache_torch_dtype,
        }
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        """Return a spec with one state for each page: the minimum and the maximum of every channel."""
        return FullAttentionSpec(block_size=vllm_config.cache_config.block_size, tokens_per_state=self.page, **self.sizes)

    def get_attn_backend(self) -> type[SummariesBackend]:
        """Return the backend whose metadata has the blocks of the summaries."""
        return SummariesBackend


@dataclass(frozen=True)
class SummariesMetadata:
    """The blocks that hold the summaries of each request: ``[requests, blocks]``."""

    block_table: Tensor


class SummariesBuilder(AttentionMetadataBuilder[SummariesMetadata]):
    """Pass on the block table of the summaries."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> SummariesMetadata:
        """Build the metadata of a batch."""
        return SummariesMetadata(common_attn_metadata.block_table_tensor)


class SummariesBackend(CPUAttentionBackend):
    """A backend that attends to nothing. vLLM asks every cache layer for one."""

    @staticmethod
    def get_builder_cls() -> type[SummariesBuilder]:
        """Return the class that builds the metadata of a batch."""
        return SummariesBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Return the block sizes that work: all of them."""
        return [MultipleOf(1)]
