"""Check the masks and the chunks that a compiled model gets from ``generate``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
)

import sparse_compile as sc
from sparse_compile.masks import Mask
from support.generating import PAD, POLICIES, SMALL, STREAMING, llama, new_tokens, prompt

pytestmark = pytest.mark.usefixtures("fresh")


# -- masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, PAD])
def test_exact_tokens_equal_those_of_the_plain_model(pad: int) -> None:
    inputs = prompt(pad=pad)
    wanted = new_tokens(llama(), inputs)
    model = sc.compile(llama(), inner="eager")
    assert torch.equal(new_tokens(model, inputs), wanted)
    assert torch.equal(new_tokens(model, inputs), wanted)
    masks = {site.model_mask for site in model.sparse_compile_report.sites}
    assert len(masks) == 1 and next(iter(masks)).startswith("causal & padding(" if pad else "causal")
    assert len(model.sparse_compile_report.sites) == 4  # a prompt and a step of two layers, and nothing was compiled again


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_a_padded_row_gets_the_tokens_of_its_text_alone(policy: sc.Policy | Mask | None) -> None:
    pad = 64 if policy is POLICIES["pages"] else PAD  # pages begin at columns, so other padding moves tokens to other pages
    inputs = prompt(140, pad=pad)
    model = sc.compile(llama(), policy, inner="eager")
    got = new_tokens(model, inputs)
    alone = new_tokens(model, {"input_ids": inputs["input_ids"][:1, pad:]})
    other = new_tokens(model, {"input_ids": inputs["input_ids"][1:]})
    assert torch.equal(got, torch.cat([alone, other]))


@pytest.mark.parametrize("pad", [0, PAD])
def test_windows_of_the_model_keep_their_kernel_under_padding(pad: int) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(sliding_window=16, **SMALL)).eval()
    wanted = new_tokens(model, prompt(pad=pad))
    assert torch.equal(new_tokens(sc.compile(model, inner="eager"), prompt(pad=pad)), wanted)


class _Sizes(TorchDispatchMode):
    """Records the largest tensor that any op returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest, self.watches = 0, True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.watches:
            tensors = [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]
            self.largest = max([self.largest, *(x.numel() for x in tensors)])
        return out


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 100}], ids=["greedy", "beams", "chunks"])
@pytest.mark.parametrize("pad", [0, PAD])
def test_nothing_allocates_queries_times_keys(pad: int, options: dict[str, Any]) -> None:
    """A dispatch mode watches what happens outside of graphs, where transformers would build masks. Graphs get two axes."""
    length = 331
    inputs = prompt(length, pad=pad)
    model = sc.compile(llama(), inner="eager")
    new_tokens(model, inputs, **options)
    compiles = model.sparse_compile_report.compiles
    run = model._compiled_call_impl.run

    def graph(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        assert (mask is None) == (pad == 0) and (mask is None or mask.dim() == 2)
        sizes.watches = False
        try:
            return run(*args, **kwargs)
        finally:
            sizes.watches = True

    model._compiled_call_impl.run = graph
    with _Sizes() as sizes:
        new_tokens(model, inputs, **options)
    assert 0 < sizes.largest < length * length
    assert model.sparse_compile_report.compiles == compiles


def test_a_prompt_is_looked_at_once_and_a_step_never() -> None:
    model = sc.compile(llama(), STREAMING, inner="eager")
    for pad in (0, PAD):
        cache = model.sparse_cache(max_length=128, max_batch=2)
        padding = cache.positions.padding
        given: list[Any] = []
        look = padding.mask_for

        def watched(mask: Tensor | None, tokens: int, held: int, look: Any = look, given: Any = given) -> Tensor | None:
            result: Tensor | None = look(mask, tokens, held)
            given.append((tokens, None if result is None else tuple(result.shape)))
            return result

        padding.mask_for = watched
        new_tokens(model, prompt(pad=pad), past_key_values=cache)
        if pad:
            assert given == [(60, (2, 128)), *[(1, (2, 128))] * 11]
        else:
            assert given in ([], [(60, None)])  # newer versions of transformers drop a mask of ones themselves


def test_a_mask_that_contradicts_the_cache_is_used_as_it_is() -> None:
    """A later call may hide tokens that the cache holds; its result equals that of the plain model."""
    plain, model = llama(), sc.compile(llama(), inner="eager")
    ids, cache, wanted = prompt(40)["input_ids"], model.sparse_cache(max_length=64, max_batch=2), DynamicCache()
    mask = torch.ones(2, 41, dtype=torch.int64)
    mask[1, 3:9] = 0
    with torch.no_grad():
        for part, seen in ((ids[:, :30], None), (ids[:, 30:], mask[:, :40]), (ids[:, :1], mask)):
            got = model(part, attention_mask=seen, past_key_values=cache).logits
            assert (got - plain(part, attention_mask=seen, past_key_values=wanted).logits).abs().max() < 1e-4


# -- chunks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, PAD])
@pytest.mark.parametrize("policy", [None, STREAMING], ids=["exact", "streaming"])
def test_a_prompt_in_chunks_gives_the_same_tokens(policy: Mask | None, pad: int) -> None:
    inputs = prompt(300, pad=pad)
    wanted = new_tokens(sc.compile(llama(), policy, inner="eager", prefill_chunk_size=None), inputs)
    torch._dynamo.reset()  # it would otherwise make the length of the first chunk dynamic
    model = sc.compile(llama(), policy, inner="eager", prefill_chunk_size=256)
    assert torch.equal(new_tokens(model, inputs), wanted)
    assert {site.q_len for site in model.sparse_compile_report.sites if site.phase == "prefill"} >= {"128"}


@pytest.mark.parametrize("kept", [1, 3, 100])
def test_chunks_keep_the_last_logits(kept: int) -> None:
    """The second length leaves a last chunk of two tokens."""
    model = sc.compile(llama(), inner="eager", prefill_chunk_size=128)
    for length in (300, 258):
        ids = prompt(length, batch=1)["input_ids"]
        with torch.no_grad():
            got = model(ids, past_key_values=model.sparse_cache(max_length=512), logits_to_keep=kept).logits
            wanted = llama()(ids, logits_to_keep=kept).logits
        assert got.shape == wanted.shape and (got - wanted).abs().max() < 1e-4


def test_a_prompt_that_does_not_fit_changes_nothing() -> None:
    model = sc.compile(llama(), inner="eager", prefill_chunk_size=128)
    cache = model.sparse_cache(max_length=256)
    with (
        torch.no_grad(),
        pytest.raises(sc.SparseCacheError, match="room for max_length=256 tokens, holds 0, and was given 300"),
    ):
        model(prompt(300, batch=1)["input_ids"], past_key_values=cache, logits_to_keep=1)
    assert cache.get_seq_length() == 0


def test_a_call_for_all_logits_runs_whole() -> None:
    model = sc.compile(llama(), inner="eager", prefill_chunk_size=128)
    with torch.no_grad():
        out = model(prompt(300)["input_ids"], past_key_values=model.sparse_cache(max_length=512, max_batch=2))
    assert out.logits.shape[1] == 300
