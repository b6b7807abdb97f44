"""Models of many architectures through the backend: exact without a policy, and equal to the oracle with a policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, full, per_head, sink, sliding_window
from support.models import DECODERS, VOCABULARY, Decoder, left_padding, tokens
from support.oracles import attention as oracle

PROMPT, STEPS = 24, 4
# Small enough to hide keys in every model; sink(4) | sliding_window(64) would show all of a tiny prompt.
STREAMING = causal & (sink(4) | sliding_window(6))
NO_STATIC_CACHE = {"falcon alibi", "mpt", "opt"}  # with a static cache, these models of transformers fail or break their graph
PATCHED = {"falcon alibi", "mpt"}  # models without an attention interface


def relative_error(got: Tensor, wanted: Tensor, rows: Tensor | None = None) -> float:
    if rows is not None:
        got, wanted = got[rows], wanted[rows]
    return float((got - wanted).abs().max() / wanted.abs().max())


pytestmark = pytest.mark.usefixtures("fresh")


def compiled(model: nn.Module, policy: Mask | None = None) -> tuple[Any, sc.Backend]:
    backend = sc.Backend(policy, inner="eager")
    return torch.compile(model, backend=backend), backend


def whole(model: Any, ids: Tensor, padding: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, attention_mask=padding, use_cache=False).logits
        return logits


def stepwise(model: Any, cache: Any, ids: Tensor, padding: Tensor | None = None) -> Tensor:
    """Return the logits of prefill and decode steps, concatenated."""
    logits = []
    with torch.no_grad():
        for start, stop in [(0, PROMPT)] + [(PROMPT + k, PROMPT + k + 1) for k in range(STEPS)]:
            seen = None if padding is None else padding[:, :stop]
            logits.append(model(ids[:, start:stop], attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def new_cache(kind: str, model: Any) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=PROMPT + STEPS + 3)


def assert_all_rewritten(backend: sc.Backend, decoder: Decoder) -> None:
    report = backend.report
    assert report.left == [], str(report)
    graphs = {site.graph for site in report.sites}
    assert len(report.rewritten) == decoder.calls * len(graphs)


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
def test_a_forward_pass_is_exact(decoder: Decoder, padded: bool) -> None:
    model = decoder.build()
    ids, padding = tokens(length=PROMPT), left_padding(length=PROMPT) if padded else None
    fast, backend = compiled(model)
    rows = None if padding is None else padding.bool()
    assert relative_error(whole(fast, ids, padding), whole(model, ids, padding), rows) < 1e-5
    assert_all_rewritten(backend, decoder)


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@pytest.mark.parametrize("marked", [False, True], ids=["dynamic=True", "marked inputs"])
def test_one_graph_of_dynamic_shapes_is_exact(decoder: Decoder, marked: bool) -> None:
    model, backend = decoder.build(), sc.Backend(inner="eager")
    fast = torch.compile(model, backend=backend, dynamic=None if marked else True)
    for batch, length in ((2, PROMPT), (3, PROMPT - 7)):
        ids, padding = tokens(batch, length), left_padding(batch, length)
        wanted = whole(model, ids, padding)
        for tensor in (ids, padding):
            for axis in (0, 1) if marked else ():
                torch._dynamo.mark_dynamic(tensor, axis)
        assert relative_error(whole(fast, ids, padding), wanted, padding.bool()) < 1e-5
    assert_all_rewritten(backend, decoder)
    assert backend.report.compiles == 1


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_prefill_and_decode_are_exact(decoder: Decoder, kind: str) -> None:
    if kind == "static" and decoder.name in NO_STATIC_CACHE:
        kind = "dynamic"
    model = decoder.build()
    ids = tokens(length=PROMPT + STEPS)
    fast, backend = compiled(model)
    got = stepwise(fast, new_cache(kind, model), ids)
    assert relative_error(got, stepwise(model, new_cache(kind, model), ids)) < 1e-5
    assert_all_rewritten(backend, decoder)
    assert {site.phase for site in backend.report.sites} == {"prefill", "decode"}


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
@pytest.mark.parametrize("setting", ["forward", "left padding", "dynamic", "static"])
def test_a_policy_equals_the_oracle(decoder: Decoder, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if setting == "static" and decoder.name in NO_STATIC_CACHE:
        setting = "dynamic"
    model = decoder.build()
    ids = tokens(length=PROMPT + STEPS)
    padding = left_padding(length=PROMPT + STEPS) if setting == "left padding" else None
    with monkeypatch.context() as patch:
        patch.setitem(oracle.extra, "mask", STREAMING)
        patch.setitem(oracle.starts, "columns", [] if padding is None else padding.argmax(dim=1).tolist())
        wanted = whole(with_oracle(decoder, patch), ids, padding)
    fast, backend = compiled(model, STREAMING)
    steps = setting in ("dynamic", "static")
    got = stepwise(fast, new_cache(setting, model), ids) if steps else whole(fast, ids, padding)
    rows = None if padding is None else padding.bool()
    assert relative_error(got, wanted, rows) < 1e-5
    assert relative_error(whole(model, ids, padding), wanted, rows) > 1e-4, "the policy hides nothing: the test shows nothing"
    assert_all_rewritten(backend, decoder)
    assert {site.action for site in backend.report.sites} == {"sparse"}


def with_oracle(decoder: Decoder, patch: pytest.MonkeyPatch) -> Any:
    """Return the same model with the attention of the oracle."""
    model = decoder.build()
    if decoder.name not in PATCHED:
        model.set_attn_implementation("oracle")
        return model
    plain_softmax, plain_sdpa = nn.functional.softmax, nn.functional.scaled_dot_product_attention

    def softmax(scores: Tensor, dim: int = -1, **rest: Any) -> Tensor:
        return plain_softmax(oracle.hide(scores), dim, **rest)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, *args: Any, **rest: Any) -> Tensor:
        shape = torch.broadcast_shapes(attn_mask.shape, (1, q.shape[1], q.shape[2], k.shape[2]))
        return plain_sdpa(q, k, v, oracle.hide(attn_mask.expand(shape)), *args, **rest)

    patch.setattr(nn.functional, "softmax", softmax)
    patch.setattr(nn.functional, "scaled_dot_product_attention", sdpa)
    return model


def test_a_policy_by_kv_head_serves_whole_query_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = DECODERS[0]
    model = decoder.build()
    policy = per_head([causal, STREAMING])
    ids = tokens()
    with monkeypatch.context() as patch:
        patch.setitem(oracle.extra, "mask", policy)
        wanted = whole(with_oracle(decoder, patch), ids)
    assert relative_error(whole(compiled(model, policy)[0], ids), wanted) < 1e-5


def test_the_policy_of_the_issue_is_exact_while_it_sees_everything() -> None:
    model = DECODERS[0].build()
    policy = causal & (sink(4) | sliding_window(64))
    assert relative_error(whole(compiled(model, policy)[0], tokens()), whole(model, tokens())) < 1e-5


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d.name in ("llama", "mistral", "gemma3_text")], ids=str)
def test_a_policy_never_reveals_what_the_model_hides(decoder: Decoder) -> None:
    """A policy that shows every key changes nothing: padding, causality and the model's own window still apply."""
    model = decoder.build()
    padding = left_padding()
    for policy in (full | sink(1), sliding_window(1000), ~(causal & ~causal)):
        torch._dynamo.reset()
        got = whole(compiled(model, policy)[0], tokens(), padding)
        assert relative_error(got, whole(model, tokens(), padding), padding.bool()) < 1e-5


def test_a_decode_loop_compiles_at_most_three_graphs() -> None:
    model = DECODERS[0].build()
    fast, backend = compiled(model)
    cache = DynamicCache(config=model.config)
    ids = torch.randint(3, VOCABULARY, (1, PROMPT + 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        fast(ids[:, :PROMPT], past_key_values=cache)
        last = [fast(ids[:, k : k + 1], past_key_values=cache).logits for k in range(PROMPT, PROMPT + 64)][-1]
    assert backend.report.compiles <= 3
    assert relative_error(last[:, -1], whole(model, ids)[:, -1]) < 1e-5


def test_one_graph_serves_growing_lengths() -> None:
    model = DECODERS[0].build()
    backend = sc.Backend(STREAMING, inner="eager")
    fast = torch.compile(model, backend=backend, dynamic=True)
    for length in (16, 24, 40, 100):
        whole(fast, tokens(length=length))
    assert backend.report.compiles == 1
    assert [site.q_len for site in backend.report.sites] != ["16", "16"]
