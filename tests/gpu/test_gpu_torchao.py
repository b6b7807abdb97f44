"""Check weights that torchao quantized on CUDA: under Inductor and in CUDA graphs, with caches in bf16, int8 and int4."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from torchao.quantization.quantize_.workflows import Int4PackingFormat
from transformers import DynamicCache

import sparse_compile as sc
from support.on_gpu import ON_GPU, logits_of_chunks
from support.oracles.cache import LAYERS, llama, random_tokens
from support.sessions.cache import ones

pytestmark = ON_GPU
# With set_inductor_config, they would change Inductor for the whole process. This packing of int4 needs no other package.
CONFIGS: dict[str, Any] = {
    "int8": Int8WeightOnlyConfig(set_inductor_config=False),
    "int4": Int4WeightOnlyConfig(
        group_size=32, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D, set_inductor_config=False
    ),
    "fp8": Float8WeightOnlyConfig(set_inductor_config=False),
    "fp8 activations": Float8DynamicActivationFloat8WeightConfig(set_inductor_config=False),
}
CHUNKS = [200, *ones(20)]
NEAR = {None: 0.03, "int8": 0.04, "int4": 0.3}  # largest relative error of the logits, by the format of the cache
ROUNDED = 0.2  # fp8 activations double the rounding errors of Inductor: stock compilation also differs by 0.14


def small(name: str) -> Any:
    """Return a small Llama in bfloat16 with quantized weights."""
    model = llama(hidden_size=256, intermediate_size=256, initializer_range=0.1).to("cuda", torch.bfloat16)
    quantize_(model, CONFIGS[name], lambda module, path: isinstance(module, torch.nn.Linear) and "lm_head" not in path)
    return model


@pytest.mark.parametrize("kv", [None, "int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_and_steps_are_near_stock_transformers(name: str, kv: str | None) -> None:
    ids = random_tokens(sum(CHUNKS)).cuda()
    wanted = logits_of_chunks(model := small(name), DynamicCache(config=model.config), ids, CHUNKS).float()
    model = sc.compile(small(name), mode="reduce-overhead")
    cache = sc.SparseCache(model.config, max_length=256, page_size=64, dtype=torch.bfloat16, device="cuda", kv=kv)
    got = logits_of_chunks(model, cache, ids, CHUNKS).float()
    assert float((got - wanted).norm() / wanted.norm()) < max(NEAR[kv], ROUNDED if "activations" in name else 0)
    report = model.sparse_compile_report
    assert report.left == [], str(report)
    assert (len(report.rewritten), report.compiles) == (LAYERS * 2, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_pass_itself_changes_nothing(name: str) -> None:
    ids = random_tokens(sum(CHUNKS)).cuda()
    wanted = logits_of_chunks(model := small(name), DynamicCache(config=model.config), ids, CHUNKS).float()
    model = sc.compile(small(name), inner="eager")
    cache = sc.SparseCache(model.config, max_length=256, page_size=64, dtype=torch.bfloat16, device="cuda")
    got = logits_of_chunks(model, cache, ids, CHUNKS).float()
    assert float((got - wanted).norm() / wanted.norm()) < NEAR[None]
