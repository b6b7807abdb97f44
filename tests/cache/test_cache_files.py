"""A file of a cache is read into caches of other sizes, and refused by caches of other weights."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_compile as sc
from sparse_compile.cache.origin import fingerprint
from sparse_compile.masks import Mask, causal, page_topk, per_head, sink, sliding_window
from support.generating import llama as generating_llama
from support.generating import new_tokens, prompt
from support.oracles.cache import error, llama, random_tokens, whole
from support.sessions.cache import DUO, NO_RETRIEVAL_BELOW, STREAMING, Session, assert_rows_alone, left_padded, ones
from support.sessions.held import HELD, TEXT, assert_goes_on, call, holding, new_cache

pytestmark = pytest.mark.usefixtures("fresh")

WIDE = per_head([causal & (sink(2) | sliding_window(20)), causal & (sink(1) | sliding_window(9))])
SHORT, LONG = 16, 64


# -- other sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [STREAMING, DUO, NO_RETRIEVAL_BELOW, WIDE], ids=["rings", "both", "layers", "wide"])
@pytest.mark.parametrize(
    ("lengths", "held"),
    [
        ((SHORT, LONG), 5),
        ((LONG, SHORT), 14),
        *(
            pytest.param(lengths, held, marks=pytest.mark.slow)
            for lengths, held in [((SHORT, LONG), 14), ((LONG, SHORT), 5), *product([(24, 40), (40, 24)], [5, 14])]
        ),
    ],
    ids=str,
)
def test_a_file_is_read_into_a_cache_of_another_max_length(
    policy: sc.Policy | Mask, lengths: tuple[int, int], held: int, tmp_path: Path
) -> None:
    ids, (before, after) = random_tokens(16), lengths
    session = Session(policy, max_length=before)
    session.feed(ids[:, :held])
    session.cache.save(tmp_path / "prompt")
    session.cache = session.another(max_length=after)
    session.cache.load(tmp_path / "prompt")
    assert session.cache.get_seq_length() == held
    assert error(session.feed(ids[:, held:], ones(16 - held)), whole(ids, policy)[:, held:]) < 1e-5


def test_a_ring_that_has_overwritten_tokens_is_read_into_one_of_another_size(tmp_path: Path) -> None:
    ids = random_tokens(40)
    changes: list[dict[str, Any]] = [{"page_size": 5}, {"rollback": 3}, {"page_size": 1}]
    for options in changes:
        torch._dynamo.reset()
        session = Session(DUO)
        session.feed(ids[:, :30])
        session.cache.save(tmp_path / "prompt")
        session.cache = sc.SparseCache(session.model.config, DUO, max_length=64, **{"page_size": 1, **options})
        session.cache.load(tmp_path / "prompt")
        assert error(session.feed(ids[:, 30:], [4, *ones(6)]), whole(ids, DUO)[:, 30:]) < 1e-5, options


def test_padding_is_read_into_a_cache_of_another_max_length(tmp_path: Path) -> None:
    ids, padding = left_padded(30, [0, 4])
    session = Session(DUO, max_length=12, max_batch=2)
    first = session.feed_padded(ids[:, :10], padding[:, :10], [10])
    session.cache.save(tmp_path / "prompt")
    session.cache = session.another(max_length=64)
    session.cache.load(tmp_path / "prompt")
    positions = (padding.cumsum(dim=1) - 1).clamp(min=0)
    logits = [first]
    with torch.no_grad():
        for at in range(10, 30):
            inputs = {"attention_mask": padding[:, : at + 1], "position_ids": positions[:, at : at + 1]}
            logits.append(session.model(ids[:, at : at + 1], past_key_values=session.cache, **inputs).logits)
    assert_rows_alone(torch.cat(logits, dim=1), ids, padding, DUO)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_quantized_pages_are_dequantized_into_the_ring_of_a_longer_cache(kv: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    ids, policy = random_tokens(64), causal & (sink(2) | sliding_window(30))
    session = Session(policy, max_length=32, page_size=8, kv=kv)
    session.feed(ids[:, :32])
    session.cache.save(tmp_path / "prompt")
    session.cache = session.another(max_length=64)
    session.cache.load(tmp_path / "prompt")
    assert error(session.feed(ids[:, 32:], ones(32)), whole(ids, policy)[:, 32:]) < (0.05 if kv == "int8" else 0.5)


def test_a_quantized_cache_of_several_storages_is_read_into_a_longer_one(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    ids, policy = random_tokens(64), per_head([causal, causal & (sink(2) | sliding_window(30))])
    session = Session(policy, max_length=32, page_size=8, kv="int8")
    session.feed(ids[:, :29])
    session.cache.save(tmp_path / "prompt")
    session.cache = session.another(max_length=64)
    session.cache.load(tmp_path / "prompt")
    assert error(session.feed(ids[:, 29:], ones(35)), whole(ids, policy)[:, 29:]) < 0.05


def test_page_summaries_are_read_into_a_longer_cache(tmp_path: Path) -> None:
    decode = per_head([causal & page_topk(16, page=4), causal & (sink(2) | sliding_window(30))])
    policy, ids = sc.Policy(prefill=causal & (sink(2) | sliding_window(30)), decode=decode), random_tokens(48)
    short, long = (Session(policy, max_length=size, page_size=8) for size in (32, 64))
    wanted = torch.cat([long.feed(ids[:, :29]), long.feed(ids[:, 29:], ones(19))], dim=1)
    short.feed(ids[:, :29])
    short.cache.save(tmp_path / "prompt")
    short.cache = short.another(max_length=64)
    short.cache.load(tmp_path / "prompt")
    assert error(short.feed(ids[:, 29:], ones(19)), wanted[:, 29:]) < 1e-5


def test_a_quantized_page_that_only_a_ring_holds_is_refused_with_the_sizes_that_work(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    policy = causal & (sink(2) | sliding_window(30))
    session = Session(policy, max_length=64, page_size=8, kv="int8")
    session.feed(random_tokens(20))
    session.cache.save(tmp_path / "prompt")
    shorter = session.another(max_length=32)
    message = "lacks tokens that this cache needs for layer 0, KV head 0: load it into a cache with max_length=64, page_size=8"
    with pytest.raises(ValueError, match=message):
        shorter.load(tmp_path / "prompt")
    assert shorter.get_seq_length() == 0


def test_a_cache_grows_where_its_heads_get_rings() -> None:
    ids, session = random_tokens(60), Session(WIDE, max_length=16)
    first = session.feed(ids[:, :15])
    session.cache.reserve(64)
    got = torch.cat([first, session.feed(ids[:, 15:], [3, *ones(42)])], dim=1)
    assert error(got, whole(ids, WIDE)) < 1e-5


# -- other weights ----------------------------------------------------------------------------------------------------------


def other_llama() -> Any:
    """A model of equal shape with other weights."""
    model = llama()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    return model


def test_a_file_of_other_weights_is_refused_by_a_cache_whose_model_is_known(tmp_path: Path) -> None:
    model, cache = holding()
    cache.save(tmp_path / "prompt")
    other = sc.compile(other_llama(), DUO, inner="eager")
    theirs = other.sparse_cache(max_length=24, page_size=1)
    message = (
        "was saved from a cache of LlamaForCausalLM, and LlamaForCausalLM, which uses this cache, has other weights: load it "
        "into a cache of the model that filled it, or run the prompt again with this model"
    )
    with pytest.raises(ValueError, match=message):
        theirs.load(tmp_path / "prompt")
    assert theirs.get_seq_length() == 0
    ours = model.sparse_cache(max_length=24, page_size=1)
    ours.load(tmp_path / "prompt")
    assert_goes_on(model, ours, DUO)


def test_a_bare_cache_refuses_other_weights_when_a_model_uses_it(tmp_path: Path) -> None:
    model, cache = holding()
    cache.save(tmp_path / "prompt")
    loaded = new_cache()
    loaded.load(tmp_path / "prompt")
    other = sc.compile(other_llama(), DUO, inner="eager")
    with pytest.raises(sc.SparseCacheError, match=r"holds 14 tokens of LlamaForCausalLM, and .* has other weights: use the"):
        call(other, loaded, TEXT[:, HELD : HELD + 1])
    assert_goes_on(model, loaded, DUO)


def test_a_cache_in_memory_refuses_another_model_until_it_is_reset() -> None:
    _, cache = holding()
    other = sc.compile(other_llama(), DUO, inner="eager")
    with pytest.raises(sc.SparseCacheError, match=r"has other weights: .*, or reset\(\) it"):
        call(other, cache, TEXT[:, HELD : HELD + 1])
    cache.reset()
    call(other, cache, TEXT[:, :HELD])
    assert cache.get_seq_length() == HELD


def test_equal_weights_in_another_object_are_accepted(tmp_path: Path) -> None:
    _, cache = holding()
    cache.save(tmp_path / "prompt")
    again = sc.compile(llama(), DUO, inner="eager")
    loaded = new_cache()
    loaded.load(tmp_path / "prompt")
    assert_goes_on(again, loaded, DUO)


def test_a_loaded_file_that_is_saved_again_keeps_its_fingerprint(tmp_path: Path) -> None:
    _, cache = holding()
    cache.save(tmp_path / "first")
    bare = new_cache()
    bare.load(tmp_path / "first")
    bare.save(tmp_path / "second")
    other = sc.compile(other_llama(), DUO, inner="eager").sparse_cache(max_length=24, page_size=1)
    with pytest.raises(ValueError, match="has other weights"):
        other.load(tmp_path / "second")


def test_a_cache_without_a_model_is_accepted_by_any(tmp_path: Path) -> None:
    model = torch.compile(llama(), backend=sc.Backend(DUO, inner="eager"))
    cache = new_cache()
    call(model, cache, TEXT[:, :HELD])
    cache.save(tmp_path / "prompt")
    theirs = sc.compile(other_llama(), DUO, inner="eager").sparse_cache(max_length=24, page_size=1)
    theirs.load(tmp_path / "prompt")
    assert theirs.get_seq_length() == HELD


def test_generate_continues_from_a_file_and_refuses_that_of_another_checkpoint(tmp_path: Path) -> None:
    model, inputs = sc.compile(generating_llama(), STREAMING, inner="eager"), prompt(20, batch=1)
    cache = model.sparse_cache(max_length=64)
    text = model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
    cache.save(tmp_path / "chat")
    wanted = new_tokens(model, {"input_ids": text, "attention_mask": torch.ones_like(text)}, 6)
    loaded = model.sparse_cache(max_length=96)
    loaded.load(tmp_path / "chat")
    got = new_tokens(model, {"input_ids": text, "attention_mask": torch.ones_like(text)}, 6, past_key_values=loaded)
    assert torch.equal(got, wanted)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="has other weights"):
        model.sparse_cache(max_length=96).load(tmp_path / "chat")


def test_copies_of_a_cache_keep_the_weights_of_their_tokens() -> None:
    model, cache = holding()
    other = sc.compile(other_llama(), DUO, inner="eager")
    for again in (copy.deepcopy(cache.origin), pickle.loads(pickle.dumps(cache.origin))):
        assert again.weights() == fingerprint(model)
        with pytest.raises(sc.SparseCacheError, match="has other weights"):
            again.use(other, 14)


# -- the fingerprint --------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two weights, a buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("saved", torch.arange(3.0))
        self.register_buffer("passing", torch.zeros(3), persistent=False)


def changed(name: str) -> str:
    """The fingerprint of a model after one value of ``name`` has changed."""
    torch.manual_seed(0)
    model = Small()
    if name:
        tensor: Tensor = model.get_parameter(name) if "." in name else model.get_buffer(name)
        with torch.no_grad():
            tensor.flatten()[0] += 1
    return fingerprint(model)


def test_a_fingerprint_follows_what_a_checkpoint_holds() -> None:
    plain = changed("")
    assert plain == changed("passing")
    assert len({plain, changed("linear.weight"), changed("linear.bias"), changed("saved")}) == 4


def test_a_fingerprint_does_not_depend_on_a_wider_dtype_nor_on_a_wrapper() -> None:
    model = Small().bfloat16()
    narrow = fingerprint(model)
    assert fingerprint(nn.Sequential(model)) == narrow
    assert fingerprint(model.float()) == narrow


def test_weights_without_memory_count_with_their_shape() -> None:
    with torch.device("meta"):
        assert fingerprint(nn.Linear(3, 4)) != fingerprint(nn.Linear(4, 3))
