"""``SparseCache(..., cache_positions=True)`` computes StreamingLLM, which places queries at cache positions."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import sparse_compile as sc
from sparse_compile.cache.rope import Rotation
from sparse_compile.masks import causal, per_head, sink, sliding_window

SINK, RECENT = 4, 12
POLICY = sc.policies.streaming_llm(sink=SINK, recent=RECENT)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
SMALLER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}

pytestmark = pytest.mark.usefixtures("fresh")


def build(name: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    return factory.from_config(AutoConfig.for_model(name, **{**SIZES, **changes}), attn_implementation="sdpa").eval()


def text(length: int) -> Tensor:
    return torch.randint(3, 99, (1, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def token_by_token(model: Any, ids: Tensor) -> Tensor:
    """The method of StreamingLLM: cache keys before their rotation, and rotate all of them again for every token."""
    config, core = model.config, model.model
    rotate = importlib.import_module(type(model).__module__).apply_rotary_pos_emb
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in core.layers]
    logits = []
    for token in ids[0]:
        hidden = core.embed_tokens(token[None, None])
        for layer, pairs in zip(core.layers, kept, strict=True):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            q = attention.q_proj(x).view(1, 1, heads, dim)
            k, v = (project(x).view(1, 1, kv_heads, dim) for project in (attention.k_proj, attention.v_proj))
            if hasattr(attention, "q_norm"):
                q, k = attention.q_norm(q), attention.k_norm(k)
            pairs.append((k.transpose(1, 2), v.transpose(1, 2)))
            if len(pairs) > SINK + RECENT:
                del pairs[SINK]
            keys, values = (torch.cat(side, dim=2) for side in zip(*pairs, strict=True))
            cos, sin = core.rotary_emb(x, torch.arange(len(pairs))[None])
            keys = rotate(keys, keys, cos, sin)[0]
            query = rotate(q.transpose(1, 2), q.transpose(1, 2), cos[:, -1:], sin[:, -1:])[0]
            seen = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            hidden = hidden + attention.o_proj(seen.transpose(1, 2).reshape(1, 1, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(model.lm_head(core.norm(hidden)))
    return torch.cat(logits, dim=1)


class Stream:
    """A compiled model and its cache."""

    def __init__(self, model: Any, **options: Any) -> None:
        options = {"max_length": 1 << 30, "page_size": 8, "dtype": torch.float32, "cache_positions": True, **options}
        self.cache = sc.SparseCache(model.config, POLICY, **options)
        self.model = sc.compile(model, POLICY, inner="eager")

    @torch.no_grad()
    def feed(self, ids: Tensor, chunks: list[int], **inputs: Any) -> Tensor:
        logits = [self.model(part.clone(), past_key_values=self.cache, **inputs).logits for part in ids.split(chunks, dim=1)]
        return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_are_those_of_keys_rotated_anew_for_every_token(name: str) -> None:
    model, ids = build(name, head_dim=16), text(60)
    wanted = token_by_token(model, ids)
    assert (Stream(model).feed(ids, [1] * 60) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "dim", "pairs", "interleaved"),
    [
        ("llama", 16, 8, False),
        ("mixtral", 16, 8, False),
        ("gpt_neox", 16, 2, False),
        ("cohere", 16, 8, True),
        ("glm", 16, 4, True),
    ],
)
def test_the_rotation_is_asked_of_the_model(name: str, dim: int, pairs: int, interleaved: bool) -> None:
    config = AutoConfig.for_model(name, **{**SIZES, **({"head_dim": 16} if name == "glm" else {})})
    found = Rotation.of(config, 0, dim)
    assert (len(found.frequencies), found.interleaved) == (pairs, interleaved)
    assert found.frequencies[0] == 1


@pytest.mark.parametrize("chunks", [[70], [7] * 10, [20, 1, 1, 17, 1, 30], [64, 6]], ids=str)
def test_chunks_change_nothing(chunks: list[int]) -> None:
    ids = text(70)
    model = build()
    wanted = token_by_token(model, ids)
    assert (Stream(model).feed(ids, chunks) - wanted).abs().max() < 1e-5


def test_positions_are_set_back_and_nobody_notices() -> None:
    """Rotary positions are set back twice, which rotates the keys in the window as well, with chunks of several sizes."""
    model, ids = build(num_hidden_layers=1), text(900)
    stream = Stream(model)
    got = stream.feed(ids, [300, *[1] * 20, 250, *[1] * 30, 300])
    assert int(stream.cache.positions.stream[0]) <= 512
    assert int(stream.cache.positions.stream[1][0]) > 0
    assert (got - token_by_token(model, ids)).abs().max() < 1e-5


@pytest.mark.slow
def test_a_million_tokens_lose_no_precision_and_no_memory() -> None:
    model = build(**SMALLER)
    stream = Stream(model)
    ids = torch.randint(3, 99, (1, 1_000_960), generator=torch.Generator().manual_seed(2))
    before = stream.cache.nbytes
    for part in ids[:, :-24].split(1024, dim=1):
        with torch.no_grad():
            stream.model(part, past_key_values=stream.cache, logits_to_keep=1)
    got = stream.feed(ids[:, -24:], [1] * 24)
    assert stream.cache.get_seq_length() == 1_000_960
    assert stream.cache.nbytes == before
    assert int(stream.cache.positions.stream[0]) <= 512
    # The last tokens depend on the sink and on two windows only, so the reference skips the text in between.
    short = torch.cat([ids[:, :SINK], ids[:, -100:]], dim=1)
    assert (got - token_by_token(model, short)[:, -24:]).abs().max() < 1e-5


def test_padded_rows_equal_each_row_alone() -> None:
    model, ids = build(), text(40).repeat(2, 1)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :7] = 0
    stream = Stream(model, max_batch=2, max_length=64)
    got = torch.cat(
        [stream.feed(ids[:, :30], [30], attention_mask=mask[:, :30])]
        + [stream.feed(ids[:, at : at + 1], [1], attention_mask=mask[:, : at + 1]) for at in range(30, 40)],
        dim=1,
    )
    assert (got[:1, 7:] - token_by_token(model, ids[:1, 7:])).abs().max() < 1e-5
    assert (got[1:] - token_by_token(model, ids[1:])).abs().max() < 1e-5


def test_generate_gives_positions_of_the_text_and_sees_the_same() -> None:
    model, ids = build(), text(30)
    stream = Stream(model, max_length=64)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
    out = stream.model.generate(ids, past_key_values=stream.cache, output_logits=True, return_dict_in_generate=True, **options)
    wanted = token_by_token(build(), out.sequences)[:, 29:-1]
    assert (torch.stack(out.logits, dim=1) - wanted).abs().max() < 1e-5


def test_a_rollback_leaves_no_trace() -> None:
    model, ids = build(), text(60)
    stream = Stream(model, rollback=8)
    stream.feed(ids[:, :40], [30, *[1] * 10])
    stream.feed(text(6) + 1, [1] * 6)
    stream.cache.crop(-6)
    got = stream.feed(ids[:, 40:], [1] * 20)
    assert (got - token_by_token(model, ids)[:, 40:]).abs().max() < 1e-5


def test_a_saved_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    model, ids = build(num_hidden_layers=1), text(640)
    stream = Stream(model)
    stream.feed(ids[:, :600], [520, 80])
    stream.cache.save(tmp_path / "stream")
    stream.cache = sc.SparseCache(model.config, POLICY, max_length=1000, page_size=8, dtype=torch.float32, cache_positions=True)
    stream.cache.load(tmp_path / "stream")
    assert (stream.feed(ids[:, 600:], [1] * 40) - token_by_token(model, ids)[:, 600:]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="another model, policy, mode"):
        sc.SparseCache(model.config, POLICY, max_length=1000, page_size=8, dtype=torch.float32).load(tmp_path / "stream")


def test_heads_that_keep_everything_are_refused() -> None:
    config = build().config
    policy = per_head([causal, causal & (sink(4) | sliding_window(12))])
    with pytest.raises(ValueError, match="needs a policy under which every head drops keys, but layer 0 keeps every key"):
        sc.SparseCache(config, policy, max_length=1000, cache_positions=True)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_model_without_rotary_positions_is_refused(name: str) -> None:
    config = AutoConfig.for_model(name)
    with pytest.raises(ValueError, match="needs a model with rotary position embeddings"):
        sc.SparseCache(config, POLICY, max_length=1000, cache_positions=True)
