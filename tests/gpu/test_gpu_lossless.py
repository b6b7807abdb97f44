"""Check lossless decoding on CUDA: its tokens, and that verifications run as CUDA graphs on kernels that read keys once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, page_topk, per_head, sink, sliding_window
from sparse_compile.passes.pieces.record_steps import RecordedSteps
from support.on_gpu import ON_GPU

pytestmark = ON_GPU
DRAFTS: dict[str, Mask] = {
    "streaming": causal & (sink(4) | sliding_window(60)),
    "pages": causal & (sink(4) | page_topk(128, page=16)),
    "by KV head": per_head([causal, causal & sliding_window(60)]),
}
PAD = 37


def model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=99, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)
    return made.to("cuda", dtype)


def prompt(pad: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 99, (2, 300), device="cuda")
    mask = torch.ones_like(ids)
    ids[0, :pad], mask[0, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def tokens(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(5)
    out: Tensor = model.generate(**inputs, **{"max_new_tokens": 32, "do_sample": False, **options})
    return out


@pytest.mark.parametrize(("draft", "pad"), [("streaming", 0), ("pages", PAD), ("by KV head", 0)])
def test_tokens_are_those_of_the_plain_model(draft: str, pad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = list[int]()
    record = RecordedSteps._record

    def counts(self: RecordedSteps, args: Any) -> Any:
        recorded.append(len(args))
        return record(self, args)

    monkeypatch.setattr(RecordedSteps, "_record", counts)
    inputs, fast = prompt(pad), sc.compile(model())
    wanted, sampled = tokens(model(), inputs), tokens(model(), inputs, do_sample=True)
    method = sc.lossless(DRAFTS[draft], ahead=3)
    for _ in range(2):
        assert torch.equal(tokens(fast, inputs, custom_generate=method), wanted)
    assert torch.equal(tokens(fast, inputs, do_sample=True, custom_generate=method), sampled)
    assert len(recorded) >= 2  # drafts and verifications
    verifications = [site for site in fast.sparse_compile_report.sites if str(site.q_len) == "4"]
    assert verifications and all(site.kernel == "FlexAttention" for site in verifications)


def test_drafts_that_see_everything_are_all_right() -> None:
    method = sc.lossless(causal, ahead=4)
    tokens(sc.compile(model()), prompt(), custom_generate=method, max_new_tokens=16)
    assert method.statistics.accepted == 12 and method.statistics.verifications == 3


@pytest.mark.parametrize("kv", [None, "int8"])
def test_bfloat16_tokens_are_those_of_decoding_through_verifications(kv: str | None) -> None:
    """The kernels of a verification round otherwise than those of a step, so tokens are compared with rounds without drafts."""
    inputs, fast = prompt(), sc.compile(model(torch.bfloat16), cache={"kv": kv} if kv else None)
    wanted = tokens(fast, inputs, custom_generate=sc.lossless(causal & sliding_window(1), ahead=3))
    got = tokens(fast, inputs, custom_generate=sc.lossless(DRAFTS["streaming"], ahead=3))
    assert (got == wanted).float().mean() > (0.999 if kv is None else 0.9)
