"""Recognize the padding of a model's mask that a cache records itself, so that kernels need not read it from a mask."""

from __future__ import annotations

from functools import reduce

from torch.fx import Node

from sparse_compile.masks import Captured, Mask, full
from sparse_compile.masks.operators import conjuncts
from sparse_compile.masks.patterns.tensor import Padding
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import memory_of
from sparse_compile.passes.ops.cache.cache_update import CacheUpdate


def without_own_padding(call: Attention, update: CacheUpdate[Node]) -> Mask:
    """The mask of the model without the padding that the cache records; the whole mask if it reads other tensors for that.

    The text positions of the cache already leave this padding out.
    """
    rest = [part for part in conjuncts(call.mask) if not _is_own(part, call, update)]
    return reduce(lambda a, b: a & b, rest) if rest else full


def _is_own(part: Mask, call: Attention, update: CacheUpdate[Node]) -> bool:
    if not isinstance(part, Padding) or update.valid is None:
        return False
    source = call.sources.get(Captured.of(part.valid).name)
    return source is not None and memory_of(source.node) is update.valid and source.drop == (slice(None),) * 2
