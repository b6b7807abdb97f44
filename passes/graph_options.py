"""Choose Inductor options for a rewritten graph on CUDA, by the kernels in it and by what it does to a cache."""

from __future__ import annotations

from typing import Any

from sparse_compile.passes.inner_compiler import CUDA_GRAPHS
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import memory_of
from sparse_compile.passes.ir.kv_source import Cached, Dense
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.torch_private import has_inductor_option


def options_for(rewrite: Rewrite, kernel: str, mode: str | None) -> dict[str, Any]:
    """Return the Inductor options for the graph of ``rewrite``. ``kernel`` and ``mode`` are those of the backend.

    Decode steps and verifications over a SparseCache run as CUDA graphs unless ``mode`` says otherwise, because their shapes
    and addresses never change. Prompts over a cache never do, because their work depends on how much the cache holds. Nor does
    a graph that returns keys or values: in the next run of a CUDA graph they would be overwritten.
    """
    # autotune tunes attention only, so matrix products stay with ATen.
    options = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"} if kernel == "autotune" else {}
    if all(call.device.type != "cuda" for call in rewrite.calls):
        return options
    if any(call.is_step or call.verifies for call in rewrite.calls):
        options |= _for_single_queries()
    if rewrite.cache_uses and all(_is_recordable_step(call, rewrite) for call in rewrite.calls):
        options |= _for_steps() | ({CUDA_GRAPHS: True} if mode is None else {})
    elif rewrite.cache_uses or _returns_keys(rewrite):
        options[CUDA_GRAPHS] = False
    return options


def _is_recordable_step(call: Attention, rewrite: Rewrite) -> bool:
    """Whether a call over a cache does the same work in every run."""
    if not isinstance(call.kv, Cached) or not (call.phase == "decode" or call.verifies):
        return False
    return all(group.choice.kernel.is_recordable for group in rewrite.head_groups[call.node])


def _for_steps() -> dict[str, Any]:
    """Return Inductor options for decode steps over a cache. These run many short kernels, so the launches dominate the cost.

    The options combine kernels that do not depend on each other. A step of Llama-3-8B with pages and rings has 105 fewer.
    """
    # ``coordinate_descent_tuning`` is not among them. With it, on an H200, a step of Llama-3-8B with 32,768 tokens takes 6.0 ms
    # instead of 6.4 ms, a step with page selection takes no less, and the first call takes 22 s longer.
    wanted = {"combo_kernels": True, "combo_kernel_per_subkernel_blocks": True}
    return {name: value for name, value in wanted.items() if has_inductor_option(name)}


def _for_single_queries() -> dict[str, Any]:
    """Return Inductor options for attention of one query, which keep the strides of tensors as they are.

    FlexAttention's decode template reads the strides of queries before Inductor pads them (torch 2.11). With 14 heads of 80
    channels, the second row of a batch is then read from another place.
    """
    return {"comprehensive_padding": False} if has_inductor_option("comprehensive_padding") else {}


def _returns_keys(rewrite: Rewrite) -> bool:
    """Whether the graph returns keys or values of an attention call, as it does with a cache that grows (``DynamicCache``)."""
    output = next(iter(reversed(rewrite.gm.graph.nodes)))
    returned = {memory_of(node) for node in output.all_input_nodes}
    sources = [call.kv for call in rewrite.calls if isinstance(call.kv, Dense)]
    return any(memory_of(node) in returned for kv in sources for node in (kv.k, kv.v))
