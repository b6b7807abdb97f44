"""Encoders and cross-attention through the backend: exact, every call reported, and no policy for cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import sparse_compile as sc
from sparse_compile.masks import causal, sink, sliding_window
from support.comparison import Comparison, compare
from support.models import VOCABULARY

N, SHORT = 20, 7
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STREAMING = causal & (sink(1) | sliding_window(3))
CROSS = "cross-attention: no policy applies, because its keys are not in the text of the queries"


def ids(length: int = N) -> Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def right_padding() -> Tensor:
    mask = torch.ones(2, N, dtype=torch.int64)
    mask[0, 15:] = 0
    return mask


def last_hidden(output: Any) -> Tensor:
    state: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return state


@dataclass(frozen=True)
class Encoder:
    """A model, its inputs, and the expected mask of each call, by the part of the module path that identifies the call."""

    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    masks: dict[str, str]
    calls: int = 2
    rows: Callable[[Tensor], Tensor] = field(default=lambda out: out)


def valid_rows(out: Tensor) -> Tensor:
    return out[right_padding().bool()]


def bert(attention: str = "sdpa") -> Any:
    model = BertModel(BertConfig(**SIZES, vocab_size=VOCABULARY))
    model.set_attn_implementation(attention)
    return model


def modernbert() -> Any:
    config = AutoConfig.for_model(
        "modernbert", **SIZES, **TOKENS, vocab_size=VOCABULARY, local_attention=8, cls_token_id=1, sep_token_id=2
    )
    build: Any = AutoModel.from_config
    return build(config)


def vit() -> Any:
    return ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8))


def t5(attention: str = "sdpa") -> Any:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))
    model.set_attn_implementation(attention)
    return model


def whisper() -> Any:
    sides: dict[str, Any] = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sides.items()},
        max_source_positions=50,
        max_target_positions=40,
        num_mel_bins=8,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **TOKENS,
    )
    return WhisperForConditionalGeneration(config)


def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def seq2seq(*, padded: bool = False) -> dict[str, Any]:
    return {
        "input_ids": ids(),
        "decoder_input_ids": ids(SHORT),
        "use_cache": False,
        **({"attention_mask": right_padding()} if padded else {}),
    }


def speech() -> dict[str, Any]:
    features = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(3))
    return {"input_features": features, "decoder_input_ids": ids(SHORT), "use_cache": False}


T5_MASKS = {"encoder.": "full, bias", "decoder.*SelfAttention": "causal, bias", "EncDecAttention": "full"}
PADDED_T5 = {"encoder.": "padding, bias", "decoder.*SelfAttention": "causal, bias", "EncDecAttention": "padding"}
ENCODERS: dict[str, Encoder] = {
    "bert": Encoder(bert, lambda: {"input_ids": ids()}, {"": "full"}),
    "bert padded": Encoder(
        bert, lambda: {"input_ids": ids(), "attention_mask": right_padding()}, {"": "padding"}, rows=valid_rows
    ),
    "bert eager": Encoder(lambda: bert("eager"), lambda: {"input_ids": ids()}, {"": "full"}),
    "bert eager padded": Encoder(
        lambda: bert("eager"), lambda: {"input_ids": ids(), "attention_mask": right_padding()}, {"": "padding"}, rows=valid_rows
    ),
    "modernbert": Encoder(modernbert, lambda: {"input_ids": ids()}, {"layers.0": "full", "layers.1": "dilated(5, 1)"}),
    "modernbert padded": Encoder(
        modernbert,
        lambda: {"input_ids": ids(), "attention_mask": right_padding()},
        {"layers.0": "padding", "layers.1": "dilated(5, 1) & padding"},
        rows=valid_rows,
    ),
    "vit": Encoder(vit, lambda: {"pixel_values": image()}, {"": "full"}),
    "t5": Encoder(t5, seq2seq, T5_MASKS, calls=6),
    "t5 padded": Encoder(t5, lambda: seq2seq(padded=True), PADDED_T5, calls=6),
    "t5 eager": Encoder(lambda: t5("eager"), lambda: seq2seq(padded=True), PADDED_T5, calls=6),
    "whisper": Encoder(whisper, speech, {"encoder.": "full", "decoder.*self_attn": "causal", "encoder_attn": "full"}, calls=6),
}


def run(encoder: Encoder, **options: Any) -> Comparison:
    torch.manual_seed(0)
    model = encoder.build().eval()
    return compare(model, output=lambda out: encoder.rows(last_hidden(out)), **encoder.inputs(), **options)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_exact_and_its_masks_are_recovered(name: str) -> None:
    encoder = ENCODERS[name]
    result = run(encoder)
    assert result.error < 1e-5
    assert result.reasons == []
    assert len(result.masks) == encoder.calls
    for path, mask in encoder.masks.items():
        first, _, last = path.partition("*")
        masks = [
            m for site, m in zip(result.report.sites, result.masks, strict=True) if first in site.module and last in site.module
        ]
        assert masks and set(masks) == {mask}


@pytest.mark.parametrize("name", ["bert padded", "modernbert", "vit"])
def test_a_policy_acts_on_encoders(name: str) -> None:
    result = run(ENCODERS[name], policy=STREAMING)
    assert {site.action for site in result.report.sites} == {"sparse"}
    assert {site.policy_mask for site in result.report.sites} == {str(STREAMING)}
    assert {site.phase for site in result.report.sites} == {"other"}
    assert result.error > 1e-3


def test_a_policy_on_bert_equals_a_dense_mask() -> None:
    torch.manual_seed(0)
    model = bert().eval()
    dense = STREAMING.dense(N, N).expand(2, 1, N, N)
    with torch.no_grad():
        wanted = model(ids(), attention_mask=dense).last_hidden_state
    result = compare(model, ids(), policy=STREAMING, output=last_hidden)
    assert (result.got - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["t5 padded", "t5 eager", "whisper"])
def test_a_policy_leaves_cross_attention_and_the_encoder_exact_and_says_why(name: str) -> None:
    report = run(ENCODERS[name], policy=STREAMING).report
    crossing = [site for site in report.sites if "EncDec" in site.module or "encoder_attn" in site.module]
    encoding = [site for site in report.sites if "encoder" in site.module.split(".")]
    decoding = [site for site in report.sites if site not in (*crossing, *encoding)]
    assert len(crossing) == len(encoding) == len(decoding) == 2
    for sites, reason in ((crossing, CROSS), (encoding, "an encoder beside a text decoder")):
        for site in sites:
            assert (site.action, site.policy_mask, site.phase) == ("exact", "", "other")
            assert reason in site.reason
    for site in decoding:
        assert (site.action, site.policy_mask) == ("sparse", str(STREAMING))
        assert CROSS not in site.reason


def test_cross_attention_of_as_many_keys_as_queries_is_no_self_attention() -> None:
    torch.manual_seed(0)
    model = t5().eval()
    report = compare(
        model, input_ids=ids(), decoder_input_ids=ids(), use_cache=False, policy=STREAMING, output=last_hidden
    ).report
    assert [site.action for site in report.sites if "encoder.block" not in site.module].count("exact") == 2


def test_decoding_with_an_encoder_is_exact() -> None:
    """Cross-attention reads its keys from a cache, so they come from no projection in the graph."""
    torch.manual_seed(0)
    model = t5().eval()

    def decode(model: Any) -> Callable[..., Tensor]:
        def steps() -> Tensor:
            quantized_parts, cache, logits = model.encoder(input_ids=ids()), None, []
            for start, stop in ((0, 3), (3, 4), (4, 5)):
                tokens = ids(SHORT)[:, start:stop]
                out = model(encoder_outputs=quantized_parts, decoder_input_ids=tokens, past_key_values=cache, use_cache=True)
                logits.append(out.logits)
                cache = out.past_key_values
            return torch.cat(logits, dim=1)

        return steps

    with torch.no_grad():
        wanted = decode(model)()
        torch._dynamo.reset()
        sc.compile(model, inner="eager")
        got = decode(model)()
    assert (got - wanted).abs().max() < 1e-5
    report = model.sparse_compile_report
    assert report.left == []
    assert {site.phase for site in report.sites if "EncDec" in site.module} == {"other"}
    assert {site.phase for site in report.sites if "SelfAttention" in site.module} == {"prefill", "decode"}
