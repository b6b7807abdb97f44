"""Replace the attention layers of a model by one layer for each part of their KV heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from sparse_compile.masks.mask import Mask
from sparse_compile.masks.selection.page_topk import PageTopK
from sparse_compile.policy import Policy
from sparse_compile.vllm.masked import LayerMask, MaskedAttention
from sparse_compile.vllm.plan import Part, Plan, Shape, plan_model
from sparse_compile.vllm.refusals import PLAIN_CACHES

Masks = dict[tuple[Mask, ...], LayerMask]


class SplitAttention(nn.Module):
    """Stand where an attention layer stood, and run its parts, which are ordinary layers of fewer heads."""

    def __init__(self, layers: dict[str, Attention], parts: tuple[Part, ...], group: int, head_size: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(layers)
        self.head_size = head_size
        kv = [torch.tensor(part.kv_heads) for part in parts]
        queries = [(heads[:, None] * group + torch.arange(group)).flatten() for heads in kv]
        self.kv_heads = [heads.tolist() for heads in kv]
        self.q_heads = [heads.tolist() for heads in queries]
        self.order = torch.cat(queries).argsort().tolist()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend ``query`` ``[tokens, heads * D]`` to ``key`` and ``value``: ``[tokens, heads * D]``."""
        q, k, v = (x.view(x.shape[0], -1, self.head_size) for x in (query, key, value))
        outs = []
        for part, own, kv in zip(self.parts.values(), self.q_heads, self.kv_heads, strict=True):
            out = part(q[:, own].flatten(1), k[:, kv].flatten(1), v[:, kv].flatten(1))
            outs.append(out.view(q.shape[0], len(own), self.head_size))
        return torch.cat(outs, dim=1)[:, self.order].flatten(1)


def split_model(model: nn.Module, vllm_config: Any, policy: Policy, *, balance: bool) -> Plan:
    """Split the attention layers of a model that has no weights yet, and return the plan.

    Raises ``ValueError`` for layers that are no plain attention, and for policies that the model or vLLM cannot follow.
    """
    context = vllm_config.compilation_config.static_forward_context
    layers = {name: layer for name, layer in context.items() if isinstance(layer, AttentionLayerBase)}
    for name, layer in layers.items():
        _check_layer(name, layer)
    by_index = {extract_layer_index(name): layer for name, layer in layers.items()}
    sizes = {(layer.num_heads, layer.num_kv_heads, layer.head_size) for layer in layers.values()}
    if sorted(by_index) != list(range(len(layers))) or len(sizes) != 1:
        raise ValueError(
            "a policy of sparse_compile inside vLLM needs one attention layer for each index, all of one size, but the model "
            f"has {', '.join(layers)} of {len(sizes)} sizes: leave sparse_compile out of additional_config for this model"
        )
    config = vllm_config.model_config
    shape = Shape(
        config.model_arch_config.total_num_attention_heads,
        config.get_total_num_kv_heads(),
        tuple(by_index[index].sliding_window for index in range(len(by_index))),
    )
    plan = plan_model(
        policy,
        shape,
        max_length=config.max_model_len,
        block_size=vllm_config.cache_config.block_size,
        ranks=get_tensor_model_parallel_world_size(),
        one_head=current_platform.is_cpu(),
        balance=balance,
    )
    masks: Masks = {}
    homes = {id(child): (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    for index, layer in by_index.items():
        parts = plan.parts(index, get_tensor_model_parallel_rank())
        if len(parts) == 1 and parts[0].kind.stock and layer.sliding_window == parts[0].kind.window:
            continue  # the policy changes nothing here
        parent, name = homes[id(layer)]
        del context[layer.layer_name]
        setattr(parent, name, _split(layer, parts, masks, vllm_config))
    return plan


def _split(layer: Attention, parts: tuple[Part, ...], masks: Masks, vllm_config: Any) -> nn.Module:
    group = layer.num_heads // layer.num_kv_heads
    layers = {part.name: _attention(layer, part, masks, vllm_config) for part in parts}
    return SplitAttention(layers, parts, group, layer.head_size)


def _attention(layer: Attention, part: Part, masks: Masks, vllm_config: Any) -> Attention:
    """Build the attention layer of a part, with the settings of the layer that it was a part of."""
    group, kind = layer.num_heads // layer.num_kv_heads, part.kind
    sizes = (len(part.kv_heads) * group, layer.head_size, layer.impl.scale)
    same: dict[str, Any] = {
        "num_kv_heads": len(part.kv_heads),
        "cache_config": vllm_config.cache_config,
        "quant_config": layer.quant_config,
        "prefix": f"{layer.layer_name}.{part.name}",
    }
    if kind.selector is not None:
        return _selected(sizes, kind.masks, kind.selector, same)
    if kind.stock:
        return Attention(*sizes, per_layer_sliding_window=kind.window, **same)
    by_head = kind.masks * len(part.kv_heads)  # those of each query head
    mask = masks.setdefault(by_head, LayerMask(by_head))
    return MaskedAttention(*sizes, mask=mask, past=kind.past, **same)


def _selected(sizes: tuple[Any, ...], masks: tuple[Mask, ...], selector: PageTopK, same: dict[str, Any]) -> Attention:
    if not current_platform.is_cpu():
        raise ValueError(f"{selector} inside vLLM runs on the CPU only, so far: use static masks on this platform")
    from sparse_compile.vllm.selected import SelectedAttention  # it imports the kernels of the CPU

    return SelectedAttention(*sizes, masks=masks, selector=selector, **same)


def _check_layer(name: str, layer: Any) -> None:
    wrong = ""
    if type(layer) is not Attention:
        wrong = f"is a {type(layer).__name__}"
    elif layer.attn_type != AttentionType.DECODER:
        wrong = f"is of type {layer.attn_type}"
    elif layer.kv_cache_dtype not in PLAIN_CACHES:  # a quantized checkpoint may set this while it builds the layer
        wrong = f"stores keys and values as {layer.kv_cache_dtype}"
    elif layer.kv_sharing_target_layer_name is not None:
        wrong = f"reads the cache of {layer.kv_sharing_target_layer_name}"
    elif layer.head_size != layer.head_size_v:
        wrong = f"has keys of {layer.head_size} channels and values of {layer.head_size_v}"
    elif layer.has_sink:
        wrong = "has learned sinks"
    elif getattr(layer.impl, "alibi_slopes", None) is not None:
        wrong = "has ALiBi slopes"
    elif getattr(layer.impl, "logits_soft_cap", None):
        wrong = f"caps its scores at {layer.impl.logits_soft_cap}"
    if wrong:
        raise ValueError(
            f"a policy of sparse_compile inside vLLM needs plain causal attention in every layer, but {name} {wrong}: leave "
            "sparse_compile out of additional_config for this model"
        )
