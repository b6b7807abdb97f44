"""A few cases that ``make test`` plays: each kind of cache, policy, model and call appears in one of them."""

from __future__ import annotations

from fuzz.case import Cache, Case, Chunk, Crop, Generate, Model, Prompt, Reload, Reset, Select, Steps, Trip

STREAMING = "causal & (sink(2) | sliding_window(5))"
PAGES = "causal & (sink(2) | page_topk(8, page=4))"

SAMPLE: dict[str, Case] = {
    "random masks by layer without a cache": Case(
        "Policy(~strided(3, 1) | sink(2), layers={1: chunked(5) | prefix([2, 9])})",
        (Prompt(30, (0, 0)),),
        Model("qwen3", 2, 1),
    ),
    "a policy for prompts, with positions spelled out": Case(
        f"Policy(prefill={STREAMING})", (Prompt(20),), Model("phi3", 4, 2), spelled=True, entry="backend"
    ),
    "a dynamic cache whose rows change": Case(
        f"per_head([causal, {STREAMING}])", (Prompt(14, (0, 0)), Steps(2), Select((1, 1, 0)), Steps(2)), cache=Cache("dynamic")
    ),
    "a static cache for a second text": Case(
        "causal & dilated(3, 2)",
        (Prompt(14), Steps(3), Reset(), Prompt(14), Steps(1)),
        Model("gpt2", 2, 2),
        Cache("static", max_length=32),
    ),
    "generate over a static cache": Case(
        STREAMING, (Prompt(20), Generate(9, "static")), Model("mistral", 2, 1, 1, 8), Cache("lent", page_size=64)
    ),
    "generate over a cache that it makes, with padding": Case(
        f"per_head([causal, {STREAMING}])", (Prompt(20, (7, 0)), Generate(4)), cache=Cache("lent", page_size=64)
    ),
    "a dynamic cache of a padded batch": Case(
        f"per_head([causal, {STREAMING}])",
        (Prompt(18, (6, 0)), Chunk(5), Steps(2)),
        Model("mistral", 4, 2, window=8),
        Cache("dynamic"),
    ),
    "rings of a padded batch, after a saved file": Case(
        STREAMING, (Prompt(20, (6, 0)), Steps(3), Reload(128), Steps(1)), cache=Cache("sparse")
    ),
    "a rollback in a model with windows of its own": Case(
        "Policy(causal, layers={1: causal & (sink(3) | sliding_window(9))})",
        (Prompt(20, (3, 0)), Steps(4), Crop(3), Chunk(6)),
        Model("gemma3_text", 4, 2, window=7),
        Cache("sparse", page_size=8, rollback=3),
    ),
    "pages for a padded batch": Case(PAGES, (Prompt(30, (5, 0)), Steps(4)), cache=Cache("sparse")),
    "pages scored now and then by another layer": Case(
        "Policy(prefill=causal, decode=causal & page_topk(12, page=2, score='mean', group='sum', every=3, share=0))",
        (Prompt(30), Steps(5), Select((0, 0)), Steps(2)),
        Model("llama", 4, 2, layers=2),
        Cache("sparse", page_size=4, alone=True),
    ),
    "a prompt with padding that selects pages beside windows": Case(
        "Policy(prefill=per_head([causal, causal & (sink(8) | sliding_window(17)), causal & page_topk(38, page=16)]))",
        (Prompt(33, (27, 10)),),
        Model("gemma3_text", 3, 3, window=13),
        Cache("sparse", page_size=64),
        spelled=True,
    ),
    "as many texts as tokens, of dynamic sizes": Case(
        "causal", (Prompt(3, (0, 0, 0)), Steps(2)), Model("llama", 2, 1, 1), Cache("sparse"), spelled=True, dynamic=True
    ),
    "quantized pages": Case(
        "causal", (Prompt(21, (3, 0)), Steps(3)), Model("mistral", 4, 2, window=9), Cache("sparse", kv="int8")
    ),
    "cache positions": Case(STREAMING, (Prompt(24), Steps(3)), cache=Cache("sparse", page_size=1, cache_positions=True)),
    "relaxed chunks": Case(STREAMING, (Prompt(20), Chunk(7), Steps(2)), cache=Cache("sparse", mode="chunk_relaxed")),
    "frames of two heads whose rings take whole pages": Case(
        "per_head([causal & (sink(4) | sliding_window(4)), causal & (sink(4) | sliding_window(60))])",
        (Prompt(120), Steps(3)),
        Model("llama", 4, 2),
        Cache("sparse", max_length=192, page_size=64, cache_positions=True),
    ),
    "cache positions in a ring as large as the cache": Case(
        "causal & (sink(3) | sliding_window(3))",
        (Prompt(20), Steps(3)),
        Model("llama", 2, 1, 1),
        Cache("sparse", max_length=61, page_size=64, cache_positions=True),
    ),
    "another text after no row was kept": Case(
        STREAMING, (Prompt(20, (0, 3)), Steps(2), Select(()), Prompt(11), Steps(2)), cache=Cache("sparse")
    ),
    "a head that sees nothing": Case(
        "per_head([causal, ~full])", (Prompt(20), Steps(3)), Model("llama", 4, 2), Cache("sparse", page_size=1)
    ),
    "a window that the policy hides": Case(
        "~sliding_window(4)", (Prompt(20), Steps(3)), Model("mistral", 4, 2, window=3), Cache("sparse")
    ),
    "another text after an error in the middle of a graph": Case(
        STREAMING, (Prompt(20), Steps(3), Trip(5), Reset(), Prompt(9), Steps(2)), cache=Cache("sparse")
    ),
    "a step after an error in the middle of a graph is refused": Case(
        STREAMING, (Prompt(20), Steps(3), Trip(5), Steps(2)), cache=Cache("sparse")
    ),
    "a list for other heads is refused": Case(
        "per_head([causal, causal, sink(1)])", (Prompt(9),), Model("llama", 4, 2), Cache("sparse")
    ),
    "a text that is too long is refused": Case(
        "causal", (Prompt(20), Steps(2), Chunk(9)), cache=Cache("sparse", max_length=24)
    ),
}
REFUSED = (
    "a step after an error in the middle of a graph is refused", "a list for other heads is refused",
    "a text that is too long is refused",
)  # fmt: skip
