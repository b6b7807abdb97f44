"""The attention modules of ``torch.nn`` through the backend: they are written out exactly, or left with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_compile.masks import causal, sink, sliding_window
from support.comparison import compare, words

N, SHORT = 20, 7
STREAMING = causal & (sink(1) | sliding_window(3))
CROSS = "cross-attention: no policy applies, because its keys are not in the text of the queries"


def hidden_keys() -> Tensor:
    hides = torch.zeros(2, N, dtype=torch.bool)
    hides[0, 15:] = True
    return hides


def stack(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def states(length: int = N) -> Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(4))


LAYERS: list[dict[str, Any]] = [{}, {"norm_first": True}, {"activation": "gelu"}, {"batch_first": False}, {"bias": False}]


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_a_transformer_encoder_is_exact(options: dict[str, Any]) -> None:
    result = compare(stack(**options), states())
    assert (result.reasons, result.masks) == ([], ["full", "full"])
    assert result.error < 1e-5
    assert [site.layer for site in result.report.sites] == [0, 1]


@pytest.mark.parametrize("nested", [False, True], ids=["dense", "nested"])
def test_a_padded_transformer_encoder_is_exact_on_valid_rows(nested: bool) -> None:
    """Eager torch may run nested tensors, which give zeros for padding."""
    model = stack()
    model.enable_nested_tensor = nested  # type: ignore[assignment]  # an attribute of the encoder
    hidden = hidden_keys()
    result = compare(model, states(), src_key_padding_mask=hidden, output=lambda out: out[~hidden])
    assert (result.reasons, [words(m) for m in result.masks]) == ([], ["~padding"] * 2)
    assert result.error < 1e-5


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_a_causal_transformer_encoder_is_exact(options: dict[str, Any]) -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    inputs = states() if options.get("batch_first", True) else states().transpose(0, 1)
    result = compare(stack(**options), inputs, mask=mask, is_causal=True)
    assert result.reasons == []
    # The fused layer of torch takes only the mask, and ignores is_causal.
    assert result.masks in (["causal"] * 2, ["~explicit"] * 2)
    assert result.error < 1e-5


def test_a_transformer_encoder_builds_its_mask_in_the_graph() -> None:
    encoder = stack(batch_first=False)

    def run(x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(N)
        out: Tensor = encoder(x, mask=mask, is_causal=False)
        return out

    result = compare(run, states().transpose(0, 1))
    assert (result.reasons, result.masks) == ([], ["causal", "causal"])
    assert result.error < 1e-5


class MultiHead(nn.Module):
    """``nn.MultiheadAttention``, whose weights are used or not."""

    def __init__(self, *, uses_weights: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(32, 4, **options)
        self.uses_weights = uses_weights

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, **options: Any) -> Tensor:
        key = query if key is None else key
        out, weights = self.attention(query, key, key if value is None else value, **options)
        total: Tensor = out + weights.sum() if self.uses_weights else out
        return total


def hidden_pairs() -> Tensor:
    return torch.triu(torch.ones(N, N, dtype=torch.bool), 1)


def as_float(hides: Tensor) -> Tensor:
    return torch.zeros(hides.shape).masked_fill(hides, -torch.inf)


HIDDEN_KEYS = hidden_keys()
HEAD_MASKS = hidden_pairs().expand(8, N, N)
HEAD_BIAS = as_float(HEAD_MASKS) + torch.arange(8.0).view(8, 1, 1) * torch.linspace(0, 1, N)
NO_WEIGHTS = {"need_weights": False}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "plain": ({}, NO_WEIGHTS, "full"),
    "unused weights": ({}, {}, "full"),
    "unused weights per head": ({}, {"average_attn_weights": False}, "full"),
    "without bias": ({"bias": False}, NO_WEIGHTS, "full"),
    "batch first": ({"batch_first": True}, NO_WEIGHTS, "full"),
    "bool mask": ({}, {**NO_WEIGHTS, "attn_mask": hidden_pairs()}, "~explicit"),
    "float mask": ({}, {**NO_WEIGHTS, "attn_mask": as_float(hidden_pairs())}, "full, bias"),
    "bool mask per head": ({}, {**NO_WEIGHTS, "attn_mask": HEAD_MASKS}, "full, bias"),
    "float mask per head": ({}, {**NO_WEIGHTS, "attn_mask": HEAD_BIAS}, "full, bias"),
    "padding": ({}, {**NO_WEIGHTS, "key_padding_mask": HIDDEN_KEYS}, "~padding"),
    "float padding": ({}, {**NO_WEIGHTS, "key_padding_mask": as_float(HIDDEN_KEYS)}, "full, bias"),
    "padding and bool mask": (
        {},
        {**NO_WEIGHTS, "key_padding_mask": HIDDEN_KEYS, "attn_mask": hidden_pairs()},
        "~explicit & ~padding",
    ),
    "padding and float mask": (
        {},
        {**NO_WEIGHTS, "key_padding_mask": as_float(HIDDEN_KEYS), "attn_mask": as_float(hidden_pairs())},
        "full, bias >> bias",
    ),
    "causal": ({}, {**NO_WEIGHTS, "attn_mask": hidden_pairs(), "is_causal": True}, "causal"),
    "causal with padding": (
        {},
        {**NO_WEIGHTS, "attn_mask": hidden_pairs(), "is_causal": True, "key_padding_mask": HIDDEN_KEYS},
        "~explicit & ~padding",
    ),
    "causal with unused weights": ({}, {"attn_mask": hidden_pairs(), "is_causal": True}, "~explicit"),
}


@pytest.mark.parametrize("name", FORMS)
def test_multi_head_attention_is_exact(name: str) -> None:
    options, inputs, mask = FORMS[name]
    query = states() if options.get("batch_first") else states().transpose(0, 1)
    result = compare(MultiHead(**options).eval(), query, **inputs)
    assert (result.reasons, result.masks) == ([], [mask])
    assert result.error < 1e-5
    assert result.report.sites[0].module == "attention"


def test_multi_head_attention_of_other_widths_is_exact() -> None:
    model = MultiHead(kdim=16, vdim=24).eval()
    keys, values = torch.randn(SHORT, 2, 16), torch.randn(SHORT, 2, 24)
    result = compare(model, states().transpose(0, 1), keys, values, need_weights=False)
    assert (result.reasons, result.masks) == ([], ["full"])
    assert result.error < 1e-5


def test_multi_head_attention_over_other_states_is_cross_attention() -> None:
    result = compare(MultiHead().eval(), states().transpose(0, 1), states().flip(1).transpose(0, 1), policy=STREAMING)
    assert [(site.action, site.phase) for site in result.report.sites] == [("exact", "other")]
    assert CROSS in result.report.sites[0].reason
    assert result.error < 1e-5


def test_multi_head_attention_over_itself_takes_a_policy() -> None:
    result = compare(MultiHead().eval(), states().transpose(0, 1), policy=STREAMING, need_weights=False)
    wanted = MultiHead().eval()(states().transpose(0, 1), attn_mask=~STREAMING.dense(N, N)[0, 0], need_weights=False)
    assert (result.got - wanted).abs().max() < 1e-5


LEFT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "used weights": ({"uses_weights": True}, {}),
    "zero attention": ({"add_zero_attn": True}, NO_WEIGHTS),
    "bias of keys and values": ({"add_bias_kv": True}, NO_WEIGHTS),
}


@pytest.mark.parametrize("name", LEFT)
def test_multi_head_attention_that_cannot_be_written_out_is_left(name: str) -> None:
    options, inputs = LEFT[name]
    result = compare(MultiHead(**options).eval(), states().transpose(0, 1), **inputs)
    assert result.masks == []
    (reason,) = result.reasons
    assert reason.startswith("nn.MultiheadAttention returns its attention weights, has no batch axis, or adds keys")
    assert result.error < 1e-5


def test_multi_head_attention_without_a_batch_is_left() -> None:
    result = compare(MultiHead().eval(), states()[0], need_weights=False)
    assert (result.masks, len(result.reasons)) == ([], 1)
    assert result.error < 1e-5
