"""Small models and prompts for tests of ``generate``."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, page_topk, per_head, sink, sliding_window

STREAMING = causal & (sink(4) | sliding_window(28))
POLICIES: dict[str, sc.Policy | Mask | None] = {
    "exact": None,
    "streaming": STREAMING,
    "by KV head": per_head([causal, STREAMING]),
    "pages": sc.Policy(prefill=causal, decode=causal & page_topk(32, page=16)),
}
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1,
}  # fmt: skip
PAD = 7


def llama(**changes: Any) -> Any:
    """A Llama of two layers whose tokens depend on what it sees."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)  # otherwise random models repeat one token, whatever they see
    return model


def prompt(length: int = 60, batch: int = 2, pad: int = 0) -> dict[str, Tensor]:
    """What a tokenizer returns for texts of which the first is ``pad`` tokens shorter."""
    torch.manual_seed(length)
    ids = torch.randint(3, SMALL["vocab_size"], (batch, length))
    mask = torch.ones_like(ids)
    ids[0, :pad], mask[0, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def tokenizer() -> Any:
    """A tokenizer whose words are the numbers of its tokens."""
    words = WordLevel({f"w{number}": number for number in range(SMALL["vocab_size"])}, unk_token="w3")
    made = Tokenizer(words)
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0")


def new_tokens(model: Any, inputs: dict[str, Tensor], count: int = 12, **options: Any) -> Tensor:
    """The ``count`` tokens that greedy ``generate`` adds."""
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False, **options)
    tokens: Tensor = out[:, inputs["input_ids"].shape[1] :]
    return tokens


class Wrapper(nn.Module):
    """A model around another one, as PEFT makes it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.generate(*args, **kwargs)
