"""Tiny random models of many architectures, with inputs, for the tests of the passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 99
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Decoder:
    """A causal language model: how to build it, and how many attention calls its graph has."""

    name: str
    config: dict[str, Any]
    calls: int = 2
    attention: str = "sdpa"

    def build(self) -> Any:
        """The model in eval mode, with the same weights every time."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.name.split(" ")[0], **self.config)
        factory: Any = AutoModelForCausalLM
        return factory.from_config(config, attn_implementation=self.attention).eval()

    def sharp(self) -> Any:
        """The frozen model with weights so large that heads differ and attention is selective."""
        model = self.build()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(6)
        return model.requires_grad_(False)

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def _small(**changes: Any) -> dict[str, Any]:
    return {**SMALL, **changes}


GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MPT = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY, "max_seq_len": 256}
GEMMA = _small(num_key_value_heads=2, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

DECODERS = [
    Decoder("llama", _small(num_key_value_heads=2)),
    Decoder("llama mha", _small(num_key_value_heads=4)),
    Decoder("llama eager", _small(num_key_value_heads=2), attention="eager"),
    Decoder("qwen2", _small(num_key_value_heads=2)),
    Decoder("qwen3", _small(num_key_value_heads=2, head_dim=16)),
    Decoder("mistral", _small(num_key_value_heads=2, sliding_window=8)),
    Decoder("gemma3_text", GEMMA),
    Decoder("gemma2 eager", {**GEMMA, "attn_logit_softcapping": 20.0}, attention="eager"),
    Decoder("phi3", _small(num_key_value_heads=2)),
    Decoder("gpt2", GPT2),
    Decoder("gpt2 eager", GPT2, attention="eager"),
    Decoder("gpt_neox", _small()),
    Decoder("opt", {**_small(), "ffn_dim": 64, "word_embed_proj_dim": 64}),
    Decoder("falcon alibi", _small(alibi=True, new_decoder_architecture=False, multi_query=True)),
    Decoder("mpt", MPT, attention="eager"),
    Decoder("mixtral", _small(num_key_value_heads=2, **MOE)),
    Decoder("gpt_oss", _small(num_key_value_heads=2, head_dim=16, sliding_window=8, **MOE), attention="eager"),
]


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    """Random token ids ``[batch, length]`` with a fixed seed."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def left_padding(batch: int = 2, length: int = 24, pad: int = 5) -> Tensor:
    """An attention mask whose first row starts with ``pad`` padding tokens."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :pad] = 0
    return mask
