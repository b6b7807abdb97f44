"""Cut calls over a SparseCache into one for each way in which heads are stored."""

from __future__ import annotations

from sparse_compile.masks.selection.page_topk import has_selector
from sparse_compile.passes.ir.attention_call import Refused
from sparse_compile.passes.ir.rewrite import Rewrite, phase_of
from sparse_compile.passes.kv.checks import find_cache, keep
from sparse_compile.passes.ops.cache_update import SparseCacheError


def find_caches(rewrite: Rewrite) -> int:
    """Find the calls whose keys and values come from a ``SparseCache``."""
    rewrite.keep([find_cache(call) for call in rewrite.calls])
    return sum(call.cache is not None for call in rewrite.calls)


def keep_in_cache(rewrite: Rewrite) -> int:
    """Cut calls over a ``SparseCache`` into one for each way its heads are kept, and write the new tokens there.

    Raises ``Refused`` if the cache is used by anything but attention that was read, or does not fit the model.
    """
    try:
        rewrite.calls, rewrite.cache_uses = keep(rewrite.gm, rewrite.calls, rewrite.left, phase_of)
    except (SparseCacheError, ValueError) as error:
        raise Refused(error) from error
    for call in rewrite.calls:
        if not call.pieces and call.policy is not None and has_selector(call.policy) and phase_of(call) == "decode":
            raise Refused(
                SparseCacheError(
                    f"decode steps choose among the pages of a SparseCache, and {call.module or call.node.name} under "
                    f"{call.policy} has none: pass past_key_values=SparseCache(config, policy, max_length=...), or give decode "
                    "steps another mask with Policy(decode=...)"
                )
            )
    return sum(len(call.pieces) for call in rewrite.calls)
