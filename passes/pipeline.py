"""Run the passes in order. They change one graph in place and report what became of every attention call."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_compile.passes.choose.assign_policy import assign_policy
from sparse_compile.passes.choose.check_shapes import check_shapes
from sparse_compile.passes.choose.text_positions import count_tokens
from sparse_compile.passes.ir.rewrite import Pass, Rewrite
from sparse_compile.passes.kv.expand_cache import expand_cache
from sparse_compile.passes.kv.find_caches import find_caches
from sparse_compile.passes.lift.lift_masks import lift_masks
from sparse_compile.passes.lower.close_regions import close_regions
from sparse_compile.passes.lower.lower_attention import lower_attention
from sparse_compile.passes.lower.remove_dead_code import remove_dead_code
from sparse_compile.passes.read.open_regions import open_regions
from sparse_compile.passes.read.read_attention import read_attention
from sparse_compile.passes.read.unfuse_modules import unfuse

UNDERSTAND: tuple[Pass, ...] = (
    open_regions, unfuse, read_attention, lift_masks, find_caches, assign_policy, check_shapes, count_tokens,
)  # fmt: skip
REPLACE: tuple[Pass, ...] = (expand_cache, lower_attention, remove_dead_code, close_regions)
PASSES: tuple[Pass, ...] = (*UNDERSTAND, *REPLACE)


def run_passes(rewrite: Rewrite, between: Sequence[Pass] = ()) -> Rewrite:
    """Run all passes over the graph, in place.

    The passes of ``between`` run when all attention calls are read and have a policy, before any of them is replaced.
    """
    for run in (*UNDERSTAND, *between, *REPLACE):
        run(rewrite)
    return rewrite
