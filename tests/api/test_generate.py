"""Check ``generate`` of a compiled model as users call it: the cache it makes and reuses, masks, chunks, and other callers."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
    pipeline,
)

import sparse_compile as sc
from sparse_compile.generation import rounded
from sparse_compile.masks import Mask, causal, page_topk, per_head, sink, sliding_window

pytestmark = pytest.mark.usefixtures("fresh")
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
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False, **options)
    tokens: Tensor = out[:, inputs["input_ids"].shape[1] :]
    return tokens


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


class Wrapper(nn.Module):
    """A model around another one, as PEFT makes it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.generate(*args, **kwargs)


def test_a_wrapper_generates_under_the_policy() -> None:
    wanted = new_tokens(sc.compile(llama(), STREAMING, inner="eager"), prompt())
    model: Any = sc.compile(Wrapper(llama()), STREAMING, inner="eager")
    assert torch.equal(new_tokens(model, prompt()), wanted)
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
