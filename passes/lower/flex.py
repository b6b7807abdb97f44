"""FlexAttention's Triton kernels, and what all kernels of FlexAttention share."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sparse_compile.masks.selection.page_topk import offered
from sparse_compile.passes.choose.block_layout import (
    Layout,
    folds,
    prefill_layout,
    selection_layout,
    selection_options,
    step_layout,
    tiles_of,
)
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.choose.tuning import kernel_options
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import op_name
from sparse_compile.passes.ir.kv_source import Selected
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.kernels.limits import SMALLEST_HEAD, SMALLEST_PAGE
from sparse_compile.passes.lower.kernel import Kernel, needs_device
from sparse_compile.passes.lower.nodes.emitter import Emitter
from sparse_compile.passes.lower.nodes.tables import tables
from sparse_compile.passes.ops.block_tables import BLOCK, tensor_names
from sparse_compile.passes.ops.flex_attention import FlexAttention, Spec
from sparse_compile.passes.ops.materialize import materialize
from sparse_compile.passes.ops.opaque_attention import attention_op
from sparse_compile.passes.storage.graph_text import to_text
from sparse_compile.passes.torch_private import overload


class FlexKernel(Kernel):
    """A kernel that FlexAttention generates."""

    realizes_captures = True

    def lower(self, call: Attention, emitter: Emitter) -> Node | Left:
        return lower_flex(call, emitter, self.layout(call, emitter.seen, emitter.scene.target))


class Triton(FlexKernel):
    """FlexAttention's Triton kernels: one for many queries, and one for a decode step."""

    name, title = "triton", "FlexAttention"
    aliases = ("flex",)
    device = "cuda"
    takes_any_mask = True

    def rank(self, call: Attention, target: Target) -> int | None:
        return 40

    def why_not(self, call: Attention, target: Target) -> str:
        return no_flex_attention(self, call, target) or not_in_triton(self, call)

    def layout(self, call: Attention, seen: NamedMask, target: Target) -> Layout:
        folded = folds(call, seen, target)
        if isinstance(call.kv, Selected) and call.kv.new.is_step:
            options, group = selection_options(call, call.kv, target), call.group if folded else 1
            return selection_layout(call, call.kv, seen, group=group, options=options)
        if folded:
            return step_layout(call, seen, target)
        return prefill_layout(call, seen, (BLOCK, BLOCK), kernel_options(tiles_of(call, "prefill", target), "prefill"))


def no_flex_attention(kernel: Kernel, call: Attention, target: Target) -> str:
    """Why the inner compiler or the device cannot run FlexAttention; empty if they can."""
    if target.inner == "eager":
        return "inner='eager' has no FlexAttention kernels"
    if target.inner != "inductor" and target.gradients:
        return f"FlexAttention has gradients only with inner='inductor', not inner={target.inner!r}"
    return needs_device(kernel, call, target)


def not_in_triton(kernel: Kernel, call: Attention) -> str:
    """Why ``kernel``, which is written in Triton, cannot run ``call``; empty if it can."""
    query_dim, _, value_dim = call.dims
    smallest = min(query_dim, value_dim)
    if smallest < SMALLEST_HEAD:
        return f"{kernel.title} needs a head_dim of at least {SMALLEST_HEAD} on CUDA, not {smallest}"
    page = call.kv.selection.page_size if call.chooses_pages and isinstance(call.kv, Selected) else BLOCK
    if page < SMALLEST_PAGE or page & (page - 1):
        return f"{kernel.title} needs a page size on CUDA that is a power of two and at least {SMALLEST_PAGE}, not {page}"
    return ""


def lower_flex(call: Attention, emitter: Emitter, layout: Layout) -> Node | Left:
    """Write FlexAttention over the tables of a layout: as a module that Inductor compiles, or as one op for other compilers."""
    prepared = tables(emitter, layout, repeat_for_group=call.chooses_pages and layout.group == 1 and call.group > 1)
    if isinstance(prepared, Left):
        return prepared
    # From here on, the mask shows everything that its selector could select: the tables list only the selected blocks.
    mask = offered(emitter.seen.mask)
    captures, scores = tuple(emitter.captures(emitter.seen.mask)), emitter.score_captures()
    assert tensor_names(mask) == tensor_names(emitter.seen.mask)
    k, v = emitter.keys_values()
    k, v = _as_buffer(emitter, k, others=()), _as_buffer(emitter, v, others=(k,))
    spec = Spec(
        mask=mask,
        heads=emitter.seen.heads,
        scale=call.scale,
        score_mod=call.score_mod,
        block=layout.block,
        options=layout.options,
        group=layout.group,
        starts=layout.starts,
        gradients=emitter.scene.target.gradients,
    )
    operands: tuple[Any, ...] = (emitter.query(), k, v, prepared, captures)
    if emitter.scene.target.inner != "inductor":
        out = emitter.call_function(emitter.node, overload(attention_op), *operands, tuple(scores), to_text(spec))
        return emitter.call_function(emitter.node, torch.transpose, out, 1, 2)  # from [B, Q, Hq, Dv] to [B, Hq, Q, Dv]
    return emitter.call_module(emitter.node, "attention", FlexAttention(spec), *operands, *scores)


def _as_buffer(emitter: Emitter, node: Node, *, others: tuple[Node, ...]) -> Node:
    """Keys or values as a buffer that the kernel can read.

    The C++ template takes the pointer of the buffer behind a view and ignores the offset of the view: for ``v`` of
    ``qkv.split(...)`` it silently reads ``q`` (torch 2.13), so a view on CPU is materialized. A cache is a buffer already, and
    so is the concatenation of a cache and new tokens. If one buffer is both keys and values, it is materialized once more,
    because torch 2.11 raises otherwise.
    """
    is_buffer = node.op == "placeholder" or op_name(node) == "cat"
    if emitter.device.type != "cpu" or (is_buffer and node not in others):
        return node
    return emitter.call_function(emitter.node, overload(materialize), node)
