"""The tiny random models of the fuzzer, and what each of their layers sees by itself."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fuzz.case import Model
from fuzz.language import CAUSAL, Rule, window

VOCABULARY, DIM = 67, 8
KINDS = ("llama", "mistral", "gemma3_text", "qwen3", "gpt2", "phi3")
WINDOWED = ("mistral", "gemma3_text")
# With rotary positions of one frequency table, which the oracle of ``cache_positions`` knows.
PLAIN_ROTARY = ("llama", "qwen3")
THETA = 10000.0


def build(model: Model, attention: str = "sdpa") -> Any:
    """Build the model, with the same weights for any ``attention``. They are so large that what a head sees matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model.kind, **_gpt2(model) if model.kind == "gpt2" else _llama_like(model))
    factory: Any = AutoModelForCausalLM
    return factory.from_config(config, attn_implementation=attention).eval().requires_grad_(False)


def own_rule(model: Model, layer: int) -> Rule:
    """What a layer of the model sees without a policy."""
    slides = model.kind == "mistral" or (model.kind == "gemma3_text" and layer % 2 == 0)
    return CAUSAL & window(model.window) if slides and model.window is not None else CAUSAL


def path(model: Model, layer: int) -> str:
    """The path of the attention module of a layer."""
    return f"transformer.h.{layer}.attn" if model.kind == "gpt2" else f"model.layers.{layer}.self_attn"


def _gpt2(model: Model) -> dict[str, Any]:
    sizes = {"n_embd": model.heads * DIM, "n_layer": model.layers, "n_head": model.heads, "n_positions": 256}
    return {**sizes, **_tokens(), "initializer_range": 0.2}


def _llama_like(model: Model) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "hidden_size": model.heads * DIM,
        "intermediate_size": 32,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        **_tokens(),
    }
    if model.kind in ("qwen3", "gemma3_text"):
        sizes["head_dim"] = DIM
    if model.kind == "mistral":
        sizes["sliding_window"] = model.window
    if model.kind == "gemma3_text":
        kinds = ["sliding_attention", "full_attention"]
        sizes |= {"layer_types": [kinds[layer % 2] for layer in range(model.layers)], "sliding_window": model.window or 4096}
    return sizes


def _tokens() -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
