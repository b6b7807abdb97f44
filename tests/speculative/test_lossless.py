"""Check that ``lossless`` gives the tokens of plain ``generate``, and leaves the cache as plain steps do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MistralConfig,
    MistralForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, explicit, page_topk, per_head, sink, sliding_window
from support.generating import PAD, SMALL, Wrapper, llama, new_tokens, prompt
from support.models import DECODERS, Decoder

DRAFTS: dict[str, sc.Policy | Mask] = {
    "streaming": causal & (sink(2) | sliding_window(12)),
    "pages": causal & page_topk(32, page=16),
    "by KV head": per_head([causal, causal & sliding_window(12)]),
    "blind": causal & sliding_window(1),
    "by layer": sc.Policy(layers={1: causal & sliding_window(9)}),
}
SAMPLED: list[dict[str, Any]] = [{}, {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}]


def compiled() -> Any:
    return sc.compile(llama(), inner="eager")


@pytest.fixture(scope="module")
def fast() -> Any:
    """A compiled model that tests share, because caches of one plan share its graphs."""
    torch._dynamo.reset()
    return compiled()


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(5)
    return model.generate(**inputs, **{"max_new_tokens": 16, "do_sample": False, **options})


@pytest.mark.parametrize(("draft", "pad"), [(name, PAD * (number % 2)) for number, name in enumerate(DRAFTS)])
def test_tokens_are_those_of_plain_generate(draft: str, pad: int, fast: Any) -> None:
    inputs, method = prompt(pad=pad), sc.lossless(DRAFTS[draft], ahead=3)
    wanted = generated(llama(), inputs)
    assert torch.equal(generated(fast, inputs, custom_generate=method), wanted)
    done = method.statistics
    assert done.tokens == 15 and 0 <= done.accepted <= done.drafted
    assert done.verifications == done.tokens - done.accepted


@pytest.mark.parametrize("pad", [0, PAD])
def test_sampled_tokens_are_those_of_plain_generate(pad: int, fast: Any) -> None:
    inputs = prompt(pad=pad)
    for choice in SAMPLED:
        wanted = generated(llama(), inputs, do_sample=True, **choice)
        state = torch.get_rng_state()
        for draft in (DRAFTS["streaming"], causal):
            method = sc.lossless(draft, ahead=3)
            assert torch.equal(generated(fast, inputs, do_sample=True, custom_generate=method, **choice), wanted)
            assert torch.equal(torch.get_rng_state(), state)
        assert method.statistics.accepted == 11 and method.statistics.verifications == 4  # drafts use the same random numbers


def test_a_model_inside_a_wrapper_decodes_alike() -> None:
    model: Any = sc.compile(Wrapper(llama()), inner="eager")
    method = sc.lossless(DRAFTS["streaming"], ahead=3)
    for inputs in (prompt(), prompt(pad=PAD)):
        assert torch.equal(generated(model, inputs, custom_generate=method), generated(llama(), inputs))
        assert method.statistics.drafted


def test_policies_that_print_alike_have_caches_of_their_own(fast: Any) -> None:
    inputs, wanted = prompt(), generated(llama(), prompt())
    for seed in range(2):  # a tensor prints as its shape
        visible = torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(seed)) < 0.8
        method = sc.lossless(causal & explicit(visible | torch.eye(128, dtype=torch.bool)), ahead=3)
        assert torch.equal(generated(fast, inputs, custom_generate=method), wanted)


@pytest.mark.parametrize("length", [1, 2])
def test_prompts_may_be_as_short_as_a_token(length: int, fast: Any) -> None:
    inputs = prompt(length)
    wanted = generated(llama(), inputs)
    assert torch.equal(generated(fast, inputs, custom_generate=sc.lossless(DRAFTS["blind"], ahead=3)), wanted)


WITHOUT_CACHE = ("falcon alibi", "mpt")  # their biases do not fit a SparseCache


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [decoder for decoder in DECODERS if decoder.name not in WITHOUT_CACHE], ids=str)
def test_tokens_of_many_models_are_those_of_plain_generate(decoder: Decoder) -> None:
    plain, model = decoder.sharp(), sc.compile(decoder.sharp(), inner="eager")
    for number in range(15):
        inputs = prompt(20 + 3 * number, batch=1)
        wanted = generated(plain, inputs)
        assert torch.equal(generated(model, inputs, custom_generate=sc.lossless(DRAFTS["streaming"], ahead=3)), wanted)


def test_drafts_that_see_everything_are_all_right(fast: Any) -> None:
    method = sc.lossless(causal, ahead=3)
    generated(fast, prompt(), custom_generate=method)
    assert method.statistics.accepted == 11 and method.statistics.verifications == 4
    assert method.statistics.tokens_a_verification == 15 / 4


def test_rows_may_end_at_different_tokens(fast: Any) -> None:
    inputs, method = prompt(batch=3), sc.lossless(DRAFTS["streaming"], ahead=3)
    end = [int(x) for x in generated(llama(), inputs)[0, -10:-8]]
    wanted = generated(llama(), inputs, eos_token_id=end)
    assert torch.equal(generated(fast, inputs, eos_token_id=end, custom_generate=method), wanted)


class _Sees(StoppingCriteria):
    """Stops at a token, and records the length of the text at every call."""

    def __init__(self, stop: int) -> None:
        self.stop, self.lengths = stop, list[int]()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.stop


def test_stopping_criteria_and_processors_are_called_once_for_each_token(fast: Any) -> None:
    stop = int(generated(llama(), prompt())[0, -3])
    seen, calls = [_Sees(stop), _Sees(stop)], [list[int](), list[int]()]

    def options(run: int) -> dict[str, Any]:
        def counts(ids: Tensor, scores: Tensor) -> Tensor:
            calls[run].append(ids.shape[1])
            return scores - len(calls[run]) * (torch.arange(scores.shape[1]) % 5)  # depends on what was called before

        return {"stopping_criteria": StoppingCriteriaList([seen[run]]), "logits_processor": LogitsProcessorList([counts])}

    wanted = generated(llama(), prompt(), **options(0))
    got = generated(fast, prompt(), **options(1), custom_generate=sc.lossless(DRAFTS["streaming"], ahead=3))
    assert torch.equal(got, wanted)
    assert seen[0].lengths == seen[1].lengths and calls[0] == calls[1]


class _Puts:
    def __init__(self) -> None:
        self.values: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.values.append([])


def test_streamers_get_every_token_by_itself(fast: Any) -> None:
    plain, ours = _Puts(), _Puts()
    generated(llama(), prompt(batch=1), streamer=plain)
    generated(fast, prompt(batch=1), streamer=ours, custom_generate=sc.lossless(DRAFTS["streaming"], ahead=3))
    assert ours.values == plain.values


def test_scores_and_hidden_states_are_those_of_each_token(fast: Any) -> None:
    wants = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "return_dict_in_generate": True}
    wanted = generated(llama(), prompt(), **wants)
    got = generated(fast, prompt(), custom_generate=sc.lossless(DRAFTS["streaming"], ahead=3), **wants)
    assert got.lossless.tokens == 15
    assert len(got.scores) == len(wanted.scores) == 16
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits))
    for ours, theirs in zip(got.hidden_states[1:], wanted.hidden_states[1:], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("draft", "kv"), [("pages", None), ("streaming", "int8")])
def test_the_cache_is_as_after_plain_steps(draft: str, kv: str | None, fast: Any) -> None:
    """Drafts leave no trace: the cache holds what a cache holds that was given the text alone, and decodes on alike."""
    model, method, inputs = fast, sc.lossless(DRAFTS[draft], ahead=3), prompt()
    cache = model.sparse_cache(max_length=128, max_batch=2, kv=kv, **method.cache_options)
    out = generated(model, inputs, past_key_values=cache, custom_generate=method)
    assert cache.host_state.columns == out.shape[1] - 1
    alone = model.sparse_cache(max_length=128, max_batch=2, kv=kv, **method.cache_options)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"], past_key_values=alone)
        with alone.verifying():
            for column in range(inputs["input_ids"].shape[1], out.shape[1] - 1):
                model(input_ids=out[:, column : column + 1], past_key_values=alone)
        # One more token, after which the summary of the newest page is that of its keys.
        nexts = [model(input_ids=out[:, -1:], past_key_values=each).logits for each in (cache, alone)]
        ours, theirs = cache.parts(2), alone.parts(2)
    torch.testing.assert_close(*nexts, atol=1e-5 if kv is None else 0.05, rtol=0)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if kv is None or "layer" not in name:
            torch.testing.assert_close(ours[name], theirs[name], msg=name)


def test_several_turns_share_a_cache(fast: Any) -> None:
    method, text, plain = sc.lossless(DRAFTS["pages"], ahead=3), prompt()["input_ids"], llama()
    cache = fast.sparse_cache(max_length=128, max_batch=2, **method.cache_options)
    for turn in range(2):
        inputs = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        wanted = generated(plain, inputs)
        got = generated(fast, inputs, past_key_values=cache, custom_generate=method)
        assert torch.equal(got, wanted)
        text = torch.cat((got, torch.full((2, 5), 7 + turn)), dim=1)


@pytest.mark.parametrize("pad", [0, PAD])
def test_windows_of_the_model_are_rings_that_take_drafts_back(pad: int) -> None:
    torch.manual_seed(0)
    plain = MistralForCausalLM(MistralConfig(sliding_window=16, **SMALL)).eval()
    wanted = generated(plain, prompt(pad=pad))
    torch._dynamo.reset()
    model = sc.compile(plain, inner="eager")
    method = sc.lossless(causal & sliding_window(4), ahead=3)
    assert torch.equal(generated(model, prompt(pad=pad), custom_generate=method), wanted)


def test_a_call_compiles_a_prompt_a_draft_and_a_verification() -> None:
    model, method = compiled(), sc.lossless(DRAFTS["streaming"], ahead=3)
    for _ in range(2):
        generated(model, prompt(), custom_generate=method)
    report = model.sparse_compile_report
    assert report.compiles == 3
    assert [(str(site.q_len), site.phase) for site in report.sites if site.layer == 0] == [
        ("60", "prefill"), ("1", "decode"), ("4", "prefill"),
    ]  # fmt: skip
    generated(model, prompt())
    assert report.compiles <= 6  # a cache of another plan has graphs of its own


def test_plain_generate_is_unchanged_afterwards(fast: Any) -> None:
    model, wanted = fast, new_tokens(llama(), prompt())
    generated(model, prompt(), custom_generate=sc.lossless(DRAFTS["blind"], ahead=3))
    assert torch.equal(new_tokens(model, prompt()), wanted)


def test_drafts_that_do_not_pay_are_left_out_with_one_warning(fast: Any) -> None:
    model, method, inputs = fast, sc.lossless(DRAFTS["blind"]), prompt()
    wanted = generated(llama(), inputs, max_new_tokens=40)
    with pytest.warns(sc.SparseCompileWarning, match=r"decodes without drafts from here on.*ahead=n drafts n tokens"):
        assert torch.equal(generated(model, inputs, max_new_tokens=40, custom_generate=method), wanted)
    assert method.statistics.drafted < 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generated(model, inputs, max_new_tokens=40, custom_generate=method), wanted)


def test_an_error_in_a_call_leaves_a_usable_cache(fast: Any) -> None:
    model, method, text = fast, sc.lossless(DRAFTS["pages"], ahead=3), prompt()
    cache = model.sparse_cache(max_length=128, max_batch=2, **method.cache_options)

    class Stops(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            if input_ids.shape[1] == 66:
                raise KeyboardInterrupt
            return torch.zeros(2, dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        generated(model, text, past_key_values=cache, custom_generate=method, stopping_criteria=[Stops()])
    wanted = generated(llama(), text)
    assert cache.host_state.columns == 65
    rest = {"input_ids": wanted[:, :66], "attention_mask": torch.ones(2, 66)}
    got = generated(model, rest, max_new_tokens=10, past_key_values=cache, custom_generate=method)
    assert torch.equal(got, wanted)


# -- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None,), TypeError, "lossless needs a policy for its drafts, got None"),
        ((causal, "often"), TypeError, "ahead needs a number of tokens or 'auto', got 'often'"),
        ((causal, 0), ValueError, "ahead needs to be from 1 to 31, got 0"),
        ((causal, True), TypeError, "ahead needs a number of tokens or 'auto', got True"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sc.lossless(arguments[0], **dict(zip(("ahead",), arguments[1:], strict=False)))


def test_what_cannot_be_verified_is_refused() -> None:
    method, inputs = sc.lossless(causal & sliding_window(8), ahead=3), prompt(batch=1)
    with pytest.raises(ValueError, match=r"lossless needs a compiled model, got LlamaForCausalLM: call sparse_compile.compile"):
        generated(llama(), inputs, custom_generate=method)
    sparse = sc.compile(llama(), causal & sliding_window(8), inner="eager")
    with pytest.raises(ValueError, match=r"this model was compiled with Policy\(.*: compile it without a policy"):
        generated(sparse, inputs, custom_generate=method)
    model = compiled()
    with pytest.raises(ValueError, match="got num_beams=2: leave num_beams out"):
        generated(model, inputs, custom_generate=method, num_beams=2)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="drafts tokens after input_ids, got inputs_embeds: pass input_ids"):
        model.generate(inputs_embeds=embeds, max_new_tokens=4, custom_generate=method)
    with pytest.raises(ValueError, match="needs a SparseCache, got DynamicCache: leave out past_key_values"):
        generated(model, inputs, custom_generate=method, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"needs a cache with its own policy and rollback=4, got policy=None"):
        generated(model, inputs, custom_generate=method, past_key_values=model.sparse_cache(max_length=256))
    small = model.sparse_cache(max_length=76, **method.cache_options)
    with pytest.raises(ValueError, match=r"needs a cache for 80 tokens, 4 more than the text may have, got max_length=76"):
        generated(model, inputs, custom_generate=method, past_key_values=small)
    alibi = next(decoder for decoder in DECODERS if decoder.name in WITHOUT_CACHE)
    with pytest.raises(ValueError, match="a SparseCache needs a model without alibi"):
        generated(sc.compile(alibi.build(), inner="eager"), inputs, custom_generate=method)
    with pytest.raises(ValueError, match="3 masks"):
        generated(model, inputs, custom_generate=sc.lossless(per_head([causal] * 3)))
