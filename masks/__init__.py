"""Describe attention patterns with masks, score mods and their algebra. This package depends only on torch."""

from sparse_compile.masks import block_mask as _block_mask  # noqa: F401  # each registers methods of Mask
from sparse_compile.masks import density as _density  # noqa: F401
from sparse_compile.masks import draw as _draw  # noqa: F401
from sparse_compile.masks import json_format as _json_format  # noqa: F401
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.mask import Mask
from sparse_compile.masks.operators import full
from sparse_compile.masks.patterns.documents import document, documents
from sparse_compile.masks.patterns.moved import coarse, of_queries, shifted
from sparse_compile.masks.patterns.neighborhood import neighborhood
from sparse_compile.masks.patterns.per_head import per_head
from sparse_compile.masks.patterns.positional import causal, chunked, dilated, sink, sliding_window, strided
from sparse_compile.masks.patterns.repeating import periodic, repeated, within
from sparse_compile.masks.patterns.tensor import explicit, padding, prefix
from sparse_compile.masks.score_mods import ScoreMod, alibi, bias, clamped, log_weight, scaled, sink_logits, softcap
from sparse_compile.masks.selection import reference as _reference  # noqa: F401
from sparse_compile.masks.selection.page_topk import page_topk

__all__ = [
    "Captured",
    "Mask",
    "ScoreMod",
    "alibi",
    "bias",
    "causal",
    "chunked",
    "clamped",
    "coarse",
    "dilated",
    "document",
    "documents",
    "explicit",
    "full",
    "log_weight",
    "neighborhood",
    "of_queries",
    "padding",
    "page_topk",
    "per_head",
    "periodic",
    "prefix",
    "repeated",
    "scaled",
    "shifted",
    "sink",
    "sink_logits",
    "sliding_window",
    "softcap",
    "strided",
    "within",
]
