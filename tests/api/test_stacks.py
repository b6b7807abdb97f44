"""Check which calls a policy reaches: prompts however they are masked, and a decoder but not the encoder beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import sparse_compile as sc
from sparse_compile.masks import causal, dilated, per_head, sink, sliding_window

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),  # by vmap
]
STREAMING = causal & (sink(2) | sliding_window(5))
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def ids(length: int = 24) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 64, (1, length))


def gemma() -> Any:
    """A text decoder of two layers with four heads, and a vision tower of two layers with three heads."""
    torch.manual_seed(0)
    text = {**SIZES, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    vision: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28,
        "patch_size": 7,
    }  # fmt: skip
    tokens: dict[str, Any] = {"mm_tokens_per_image": 4, "image_token_id": 60, "boi_token_index": 61, "eoi_token_index": 62}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **tokens)).eval()


def rows(model: Any, inputs: dict[str, Any]) -> dict[str, str]:
    """The mask that the policy adds, by module."""
    with torch.no_grad():
        model(**inputs)
    return {site.module: site.policy_mask for site in model.sparse_compile_report.sites}


def with_image() -> dict[str, Any]:
    text = ids()
    text[0, 5:9] = 60
    return {"input_ids": text, "pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (text == 60).long()}


def packed() -> dict[str, Any]:
    return {"position_ids": torch.cat([torch.arange(10), torch.arange(14)])[None]}


def four_axes() -> dict[str, Any]:
    return {"attention_mask": torch.ones(24, 24).tril().bool()[None, None]}


@pytest.mark.parametrize("more", [dict, packed, four_axes])
def test_a_policy_for_prompts_reaches_prompts_however_they_are_masked(more: Any) -> None:
    inputs = {"input_ids": ids(), "use_cache": False, **more()}
    by_phase = sc.compile(llama(), sc.Policy(None, prefill=STREAMING), inner="eager")
    everywhere = sc.compile(llama(), STREAMING, inner="eager")
    with torch.no_grad():
        assert torch.equal(by_phase(**inputs).logits, everywhere(**inputs).logits)
        assert not torch.allclose(by_phase(**inputs).logits, llama()(**inputs).logits)
    assert {site.phase for site in by_phase.sparse_compile_report.sites} == {"prefill"}


@pytest.mark.parametrize(
    "policy", [STREAMING, sc.Policy(None, layers={0: STREAMING, 1: STREAMING}), per_head([causal, STREAMING])], ids=str
)
def test_a_policy_leaves_a_vision_tower_alone(policy: Any) -> None:
    found = rows(sc.compile(gemma(), policy, inner="eager"), with_image())
    assert {mask for module, mask in found.items() if "vision" in module} == {""}
    assert all(mask for module, mask in found.items() if "vision" not in module)
    assert sum("language_model.layers" in module for module in found) == 2


def test_a_policy_reaches_a_vision_tower_by_its_path() -> None:
    policy = sc.Policy(None, layers={"*vision_tower*": dilated(3, 1)})
    found = rows(sc.compile(gemma(), policy, inner="eager"), with_image())
    assert {mask for module, mask in found.items() if "encoder.layers" in module} == {str(dilated(3, 1))}
    assert {mask for module, mask in found.items() if "vision" not in module} == {""}


def test_the_report_says_why_an_encoder_stays_exact() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    model = sc.compile(T5ForConditionalGeneration(T5Config(**sizes)).eval(), STREAMING, inner="eager")
    with torch.no_grad():
        model(input_ids=ids(), decoder_input_ids=ids(9))
    reasons = {site.module.split(".")[0]: site.reason for site in model.sparse_compile_report.sites if site.phase == "other"}
    assert "an encoder beside a text decoder" in reasons["encoder"]


class Stack(nn.Module):
    """One attention over the hidden states."""

    def __init__(self, *, is_causal: bool) -> None:
        super().__init__()
        self.qkv, self.is_causal = nn.Linear(8, 24), is_causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y[:, None] for y in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)[:, 0]


class TowerAndDecoder(nn.Module):
    """A tower and a decoder with a graph break between them, and the config of a model that has both."""

    def __init__(self) -> None:
        super().__init__()
        self.config = gemma().config
        self.tower, self.decoder = Stack(is_causal=False), Stack(is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tower(x)
        torch._dynamo.graph_break()
        hidden: Tensor = self.decoder(x)
        return hidden


def test_a_bare_backend_leaves_a_tower_alone_that_is_a_graph_of_its_own() -> None:
    backend = sc.Backend(STREAMING, inner="eager")
    run: Any = torch.compile(TowerAndDecoder(), backend=backend)
    with torch.no_grad():
        run(torch.randn(1, 9, 8))
    assert {site.module: site.policy_mask for site in backend.report.sites} == {"tower": "", "decoder": str(STREAMING)}
