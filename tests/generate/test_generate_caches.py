"""Check the caches that ``generate`` of a compiled model makes and reuses, and who else calls ``generate``."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
    pipeline,
)

import sparse_compile as sc
from sparse_compile.generation import rounded
from sparse_compile.masks import causal, sink, sliding_window
from support.generating import PAD, STREAMING, Wrapper, llama, new_tokens, prompt, tokenizer
from support.models import DECODERS

pytestmark = pytest.mark.usefixtures("fresh")


# -- caches -------------------------------------------------------------------------------------------------------------


def test_a_second_call_reuses_the_memory_and_the_graphs() -> None:
    model = sc.compile(llama(), STREAMING, inner="eager")
    held = []
    for length in (60, 61, 50, 55):
        new_tokens(model, prompt(length))
        held.append(model.generate.__self__._spare.cache)
    assert all(cache is held[0] for cache in held)
    assert model.sparse_compile_report.compiles == 3  # two lengths of a prompt, of which the second is dynamic, and a step


def test_a_larger_call_gets_a_larger_cache_and_a_smaller_one_keeps_it() -> None:
    model = sc.compile(llama(), inner="eager")
    sizes = []
    for length, batch in ((60, 2), (400, 2), (60, 1), (60, 3)):
        wanted = new_tokens(llama(), prompt(length, batch))
        assert torch.equal(new_tokens(model, prompt(length, batch)), wanted)
        cache = model.generate.__self__._spare.cache
        sizes.append((cache.max_length, cache.max_batch))
    assert sizes == [(128, 2), (448, 2), (448, 2), (128, 3)]


def test_the_caller_keeps_the_cache_that_generate_returns() -> None:
    model = sc.compile(llama(), inner="eager")
    out = model.generate(**prompt(), max_new_tokens=4, return_dict_in_generate=True)
    new_tokens(model, prompt(50))
    assert isinstance(out.past_key_values, sc.SparseCache) and out.past_key_values.get_seq_length() == 63
    longer = torch.cat([out.sequences, prompt(5)["input_ids"]], dim=1)
    again = model.generate(longer, past_key_values=out.past_key_values, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, llama().generate(longer, max_new_tokens=4, do_sample=False))


def test_a_model_whose_biases_do_not_fit_gets_a_cache_of_transformers() -> None:
    falcon = next(decoder for decoder in DECODERS if decoder.name == "falcon alibi")
    wanted = new_tokens(falcon.build(), prompt())
    model = sc.compile(falcon.build(), inner="eager")
    assert torch.equal(new_tokens(model, prompt()), wanted)
    assert any("without alibi, got FalconConfig(alibi=True)" in note for note in model.sparse_compile_report.notes)
    with pytest.raises(ValueError, match=r"a SparseCache needs a model without alibi.*: use a DynamicCache"):
        model.sparse_cache(max_length=64)


def test_another_text_over_a_full_cache_is_refused() -> None:
    model = sc.compile(llama(), inner="eager")
    cache = model.sparse_cache(max_length=256, max_batch=2)
    new_tokens(model, prompt(90), past_key_values=cache)
    with pytest.raises(sc.SparseCacheError, match=r"holds 101 tokens, and the prompt has 40: call reset\(\)"):
        new_tokens(model, prompt(40), past_key_values=cache)
    cache.reset()
    assert torch.equal(new_tokens(model, prompt(40), past_key_values=cache), new_tokens(llama(), prompt(40)))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("pad", [0, PAD])
def test_beams_equal_those_of_the_plain_model(options: dict[str, Any], pad: int) -> None:
    inputs = prompt(pad=pad)
    assert torch.equal(
        new_tokens(sc.compile(llama(), inner="eager"), inputs, **options), new_tokens(llama(), inputs, **options)
    )


def test_samples_have_rows_of_their_own() -> None:
    model = sc.compile(llama(), inner="eager")
    out = model.generate(**prompt(), do_sample=True, num_return_sequences=3, max_new_tokens=4)
    assert out.shape == (6, 64)


def test_assisted_decoding_takes_tokens_back() -> None:
    inputs = prompt(batch=1)
    wanted = new_tokens(llama(), inputs)
    for policy in (None, causal & (sink(4) | sliding_window(200))):
        model = sc.compile(llama(), policy, inner="eager")
        assert torch.equal(new_tokens(model, inputs, prompt_lookup_num_tokens=5), wanted)
        assert torch.equal(new_tokens(model, inputs, assistant_model=llama(num_hidden_layers=1)), wanted)


@pytest.mark.parametrize("cache", ["dynamic", "static", DynamicCache, StaticCache])
def test_caches_of_transformers_are_used_where_they_are_asked_for(cache: Any) -> None:
    model = sc.compile(llama(), inner="eager")
    if isinstance(cache, str):
        options: dict[str, Any] = {"cache_implementation": cache}
    else:
        sizes = {"max_cache_len": 128} if cache is StaticCache else {}
        options = {"past_key_values": cache(config=model.config, **sizes)}
    assert torch.equal(new_tokens(model, prompt(), **options), new_tokens(llama(), prompt()))
    assert model.generate.__self__._spare.cache is None


def test_options_of_the_cache_are_said_once() -> None:
    model = sc.compile(llama(head_dim=32), inner="eager", cache={"kv": "int8"})
    new_tokens(model, prompt())
    assert model.generate.__self__._spare.cache.kv_formats == {"int8"}
    new_tokens(model, prompt(), cache_config={"kv": "fp8"})
    assert model.generate.__self__._spare.cache.kv_formats == {"fp8"}
    assert model.sparse_cache(max_length=64).kv_formats == {"int8"}


def test_a_model_without_room_for_a_sparse_cache_runs_with_its_own() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    sizes |= {"decoder_start_token_id": 0, "eos_token_id": None}
    t5 = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    wanted = t5.generate(**prompt(), max_new_tokens=4)
    assert torch.equal(sc.compile(t5, inner="eager").generate(**prompt(), max_new_tokens=4), wanted)


def test_options_that_a_model_cannot_have_are_not_lost_without_a_word() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    sizes |= {"decoder_start_token_id": 0, "eos_token_id": None}
    model = sc.compile(T5ForConditionalGeneration(T5Config(**sizes)).eval(), inner="eager", cache={"kv": "int8"})
    with pytest.warns(
        sc.SparseCompileWarning, match=r"it has an encoder.*The options \{'kv': 'int8'\} of its cache do not apply"
    ):
        model.generate(**prompt(), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"Linear has no generate\(\) of transformers: leave cache out"):
        sc.compile(nn.Linear(2, 2), cache={"kv": "int8"})


def test_learned_positions() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, pad_token_id=0, eos_token_id=None)).eval()
    wanted = new_tokens(model, prompt(pad=PAD))
    assert torch.equal(new_tokens(sc.compile(model, inner="eager"), prompt(pad=PAD)), wanted)


# -- other callers ------------------------------------------------------------------------------------------------------


def test_a_streamer_in_a_thread_gets_every_token() -> None:
    model, words = sc.compile(llama(), STREAMING, inner="eager"), tokenizer()
    wanted = new_tokens(model, prompt(batch=1))
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    thread = Thread(target=model.generate, kwargs={**prompt(batch=1), "max_new_tokens": 12, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == words.decode(wanted[0]).split()


def test_a_pipeline_uses_the_cache_of_the_policy() -> None:
    model, words = sc.compile(llama(), STREAMING, inner="eager"), tokenizer()
    text = words.decode(prompt(40, batch=1)["input_ids"][0])
    run: Any = pipeline("text-generation", model=model, tokenizer=words)
    (out,) = run(text, max_new_tokens=5, do_sample=False, return_full_text=False)
    assert out["generated_text"].split() == words.decode(new_tokens(model, words(text, return_tensors="pt"), 5)[0]).split()
    assert model.generate.__self__._spare.cache is not None


def test_a_wrapper_generates_under_the_policy() -> None:
    model: Any = sc.compile(Wrapper(llama()), STREAMING, inner="eager")
    for inputs in (prompt(), prompt(pad=PAD), prompt(50, pad=PAD)):
        wanted = new_tokens(sc.compile(llama(), STREAMING, inner="eager"), inputs)
        assert torch.equal(new_tokens(model, inputs), wanted)
        assert not torch.equal(new_tokens(llama(), inputs), wanted)
    assert {site.policy_mask for site in model.sparse_compile_report.sites} == {str(STREAMING)}
    with torch.no_grad():
        logits = model(prompt()["input_ids"]).logits
        assert (logits - sc.compile(llama(), STREAMING, inner="eager")(prompt()["input_ids"]).logits).abs().max() < 1e-5


def test_two_threads_have_caches_of_their_own() -> None:
    model = sc.compile(llama(), STREAMING, inner="eager")
    inputs = [prompt(60), prompt(61)]
    wanted = [new_tokens(model, each) for each in inputs]
    got: dict[int, Tensor] = {}

    def run(at: int) -> None:
        got[at] = new_tokens(model, inputs[at])

    threads = [Thread(target=run, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[at], wanted[at]) for at in range(2))


def test_a_saved_model_is_as_it_was(tmp_path: Path) -> None:
    model = sc.compile(llama(), inner="eager")
    new_tokens(model, prompt())
    model.save_pretrained(tmp_path)
    assert "disable_compile" not in json.loads((tmp_path / "generation_config.json").read_text())
    model.config.dtype = "float32"
    assert sc.SparseCache(model.config, max_length=64).dtype == torch.float32
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(new_tokens(loaded, prompt()), new_tokens(llama(), prompt()))


def test_lengths_are_rounded_by_at_most_a_thirty_second() -> None:
    for length in (1, 63, 64, 1000, 4096, 131_135, 1_000_000):
        assert length <= rounded(length) <= max(64 + length, length * 33 / 32)
    assert rounded(131_072 + 63) == 135_168


# -- static caches ------------------------------------------------------------------------------------------------------


def test_steps_over_a_static_cache_know_where_they_are_in_the_text() -> None:
    """Transformers makes a mask of queries times keys for each step, which does not say so. The graph makes it instead."""
    model = sc.compile(llama(), STREAMING, inner="eager")
    wanted = new_tokens(sc.compile(llama(), STREAMING, inner="eager"), prompt())
    assert torch.equal(new_tokens(model, prompt(), cache_implementation="static"), wanted)
    assert {site.model_mask for site in model.sparse_compile_report.sites} == {"causal"}


def test_a_mask_from_outside_over_a_static_cache_leaves_the_policy_out_and_says_so() -> None:
    model: Any = torch.compile(llama(), backend=sc.Backend(STREAMING, inner="eager"))
    ids, cache = prompt(20, 1)["input_ids"], StaticCache(config=llama().config, max_cache_len=32)
    mask = (torch.arange(20)[:, None] >= torch.arange(32))[None, None]
    with torch.no_grad(), pytest.warns(sc.SparseCompileWarning, match="not known which keys are those of the queries: pass"):
        got = model(ids, past_key_values=cache, attention_mask=mask, position_ids=torch.arange(20)[None]).logits
    torch.testing.assert_close(got, llama()(ids).logits)
