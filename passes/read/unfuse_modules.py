"""Write out ``nn.MultiheadAttention`` and the fused ``nn.TransformerEncoderLayer`` as plain operations around attention.

Dynamo records each as a single node: ``F.multi_head_attention_forward``, and in eval mode ``_transformer_encoder_layer_fwd``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from sparse_compile.passes.ir.fx_emit import inline
from sparse_compile.passes.ir.fx_nodes import argument, op_name, shape_of, value_of
from sparse_compile.passes.ir.rewrite import Rewrite

ATTENTION = (
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p "
    "out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight "
    "q_proj_weight k_proj_weight v_proj_weight static_k static_v average_attn_weights is_causal"
).split()
LAYER = (
    "src embed_dim num_heads qkv_weight qkv_bias proj_weight proj_bias use_gelu norm_first eps norm_weight_1 "
    "norm_bias_1 norm_weight_2 norm_bias_2 ffn_weight_1 ffn_bias_1 ffn_weight_2 ffn_bias_2 mask mask_type"
).split()


def unfuse_modules(gm: GraphModule) -> int:
    """Replace every fused node that can be written out exactly; returns how many."""
    changed = 0
    for node in list(gm.graph.nodes):
        if op_name(node) == "multi_head_attention_forward":
            changed += _multi_head_attention(gm, node)
        elif op_name(node) == "_transformer_encoder_layer_fwd":
            changed += _encoder_layer(gm, node)
    if changed:
        gm.graph.lint()
        gm.recompile()
    return changed


def _given(node: Node, names: list[str]) -> dict[str, Any]:
    return {name: argument(node, at, name) for at, name in enumerate(names)}


def _attend(q: Any, k: Any, v: Any, heads: int, mask: Any, *, causal: bool = False, dropout: float = 0.0) -> Any:
    """Attention over ``[N, L, E]`` tensors, with a mask for ``scaled_dot_product_attention``."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def _multi_head_attention(gm: GraphModule, node: Node) -> int:
    """Write out ``F.multi_head_attention_forward`` over ``[L, N, E]``, unless its weights are used or keys are added."""
    given = _given(node, ATTENTION)
    users = list(node.users)
    weights_used = any(user.target is not operator.getitem or (user.args[1] == 1 and user.users) for user in users)
    extended = given["add_zero_attn"] or any(given[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v"))
    if weights_used or extended or len(shape_of(given["query"]) or ()) != 3:
        return 0
    # As in torch, is_causal replaces the mask, unless padding or the weights need the mask itself.
    causal = bool(given["is_causal"]) and given["key_padding_mask"] is None and given["need_weights"] is False
    mask = None if causal else given["attn_mask"]
    dropout = 0.0 if given["training"] is False else given["dropout_p"]
    dtype = value_of(given["query"]).dtype
    is_float = [value_of(m).is_floating_point() for m in (mask, given["key_padding_mask"]) if m is not None]

    def forward(
        inputs: list[Any], weight: Any, biases: Any, weights: list[Any], out: list[Any], mask: Any, padding: Any
    ) -> Any:
        if weight is not None:
            weights = weight.chunk(3)
        split = biases.chunk(3) if biases is not None else (None, None, None)
        q, k, v = (F.linear(x.transpose(0, 1), weights[n], split[n]) for n, x in enumerate(inputs))
        parts = [_as_sdpa(part, additive=any(is_float), dtype=dtype) for part in (mask, padding) if part is not None]
        if mask is not None and len(shape_of(mask.node) or ()) == 3:
            parts[0] = parts[0].unflatten(0, (-1, given["num_heads"]))
        if padding is not None:
            parts[-1] = parts[-1].unsqueeze(1).unsqueeze(1)
        joined = parts[0] if parts else None
        if len(parts) == 2:
            joined = parts[0] + parts[1] if any(is_float) else parts[0] & parts[1]
        attended = _attend(q, k, v, given["num_heads"], joined, causal=causal, dropout=dropout)
        return F.linear(attended.transpose(0, 1), *out)

    result = inline(
        node,
        forward,
        [given[name] for name in ("query", "key", "value")],
        given["in_proj_weight"],
        given["in_proj_bias"],
        [given[f"{name}_proj_weight"] for name in "qkv"],
        [given["out_proj_weight"], given["out_proj_bias"]],
        mask,
        given["key_padding_mask"],
    )
    for user in users:
        if user.args[1] == 0:
            user.replace_all_uses_with(result)
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    return 1


def _as_sdpa(mask: Any, *, additive: bool, dtype: torch.dtype) -> Any:
    """Convert a mask of ``nn.MultiheadAttention`` (true means hidden) to one for ``scaled_dot_product_attention``."""
    if value_of(mask.node).is_floating_point():
        return mask
    shown = mask.logical_not()
    if not additive:
        return shown
    return torch.where(shown, 0.0, -torch.inf).to(dtype)


def _encoder_layer(gm: GraphModule, node: Node) -> int:
    """Write out ``torch._transformer_encoder_layer_fwd``, a whole layer over ``[N, L, E]`` whose mask is true where hidden."""
    given = _given(node, LAYER)
    source = value_of(given["src"])
    if not isinstance(source, Tensor) or source.is_nested or source.dim() != 3:
        return 0
    kind = given["mask_type"]

    def forward(x: Any, qkv: list[Any], out: list[Any], norms: list[list[Any]], ffn: list[list[Any]], mask: Any) -> Any:
        if mask is not None:
            mask = mask.to(torch.bool).logical_not()
            if kind == 1:  # key padding [N, L]; type 0 is [L, L], and type 2 is [N, heads, L, L]
                mask = mask.unsqueeze(1).unsqueeze(1)

        def attention(x: Any) -> Any:
            q, k, v = F.linear(x, *qkv).chunk(3, -1)
            return F.linear(_attend(q, k, v, given["num_heads"], mask), *out)

        def feed_forward(x: Any) -> Any:
            activation = F.gelu if given["use_gelu"] else F.relu
            return F.linear(activation(F.linear(x, *ffn[0])), *ffn[1])

        for step, norm in zip((attention, feed_forward), norms, strict=True):
            if given["norm_first"]:
                x = x + step(F.layer_norm(x, (given["embed_dim"],), norm[0], norm[1], given["eps"]))
            else:
                x = F.layer_norm(x + step(x), (given["embed_dim"],), norm[0], norm[1], given["eps"])
        return x

    result = inline(
        node,
        forward,
        given["src"],
        [given["qkv_weight"], given["qkv_bias"]],
        [given["proj_weight"], given["proj_bias"]],
        [[given[f"norm_{part}_{n}"] for part in ("weight", "bias")] for n in (1, 2)],
        [[given[f"ffn_{part}_{n}"] for part in ("weight", "bias")] for n in (1, 2)],
        given["mask"],
    )
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    return 1


def unfuse(rewrite: Rewrite) -> int:
    """Write out the fused modules of ``torch.nn``, so that the next pass can read their attention."""
    return unfuse_modules(rewrite.gm)
