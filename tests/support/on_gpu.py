"""Code that CUDA tests share: their marks, and the logits of a text through a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.models import left_padding, tokens

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # tests compare fp32, so tf32 stays off
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]


def logits_of_chunks(model: Any, cache: Any, ids: Tensor, chunks: list[int]) -> Tensor:
    """The logits ``[B, Q, vocabulary]`` of a text in chunks. The last chunks may be steps that replay a CUDA graph."""
    logits = []
    with torch.no_grad():
        for part in ids.split(chunks, dim=1):
            torch.compiler.cudagraph_mark_step_begin()
            logits.append(model(part.clone(), past_key_values=cache).logits.clone())
    return torch.cat(logits, dim=1)


def logits_of_padded(model: Any, cache: Any, length: int, pad: int) -> Tensor:
    """The ``generate`` logits ``[20, B, vocabulary]`` after rows of ``length`` tokens, one with ``pad`` of padding."""
    inputs = {"attention_mask": left_padding(length=length, pad=pad).cuda(), "past_key_values": cache}
    out = model.generate(
        tokens(length=length).cuda(), **inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits)
