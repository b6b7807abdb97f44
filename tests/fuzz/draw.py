"""Hypothesis strategies for cases: every model, mask, policy, cache and sequence of calls."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fuzz.case import Cache, Call, Case, Chunk, Crop, Generate, Model, Prompt, Reload, Reset, Select, Steps, Trip
from fuzz.models import KINDS, PLAIN_ROTARY, WINDOWED

small = st.integers(1, 9)


# -- policies -------------------------------------------------------------------------------------------------------------


@st.composite
def _tables(draw: st.DrawFn, name: str, rows: int) -> str:
    """A mask with a table for each row, now and then of too few rows or positions."""
    rows = draw(st.sampled_from([1, rows, rows, rows, 2]))
    length = draw(st.sampled_from([128, 128, 128, 24]))
    if name == "prefix":
        return f"prefix({draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))})"
    cuts = draw(st.lists(st.integers(1, 20), min_size=rows, max_size=rows))
    if name == "document":
        return f"document([{', '.join(f'[0] * {cut} + [1] * {length - cut}' for cut in cuts)}])"
    return f"padding([{', '.join(f'[True] * {cut} + [False] + [True] * {length - cut - 1}' for cut in cuts)}])"


@st.composite
def masks(draw: st.DrawFn, rows: int, depth: int = 2) -> str:
    """A mask without lists for heads and without page selection."""
    if depth and draw(st.integers(0, 2)):
        operator = draw(st.sampled_from(["&", "&", "|", "|", "~"]))
        inner = draw(masks(rows, depth - 1))
        return f"~({inner})" if operator == "~" else f"({inner} {operator} {draw(masks(rows, depth - 1))})"
    match draw(st.sampled_from("sink window window causal full chunked strided dilated prefix table".split())):
        case "sink":
            return f"sink({draw(small)})"
        case "window":
            return f"sliding_window({draw(st.integers(1, 20))})"
        case "chunked":
            return f"chunked({draw(st.integers(2, 12))})"
        case "strided":
            return f"strided({draw(st.integers(1, 4))}, {draw(st.integers(0, 2))})"
        case "dilated":
            return f"dilated({draw(st.integers(1, 4))}, {draw(st.integers(1, 3))})"
        case "prefix":
            return f"prefix({draw(small)})"
        case "table":
            return draw(_tables(draw(st.sampled_from(["prefix", "document", "padding"])), rows))
        case name:
            return name


streaming = st.builds(lambda a, b: f"causal & (sink({a}) | sliding_window({b}))", small, st.integers(1, 20))


@st.composite
def selections(draw: st.DrawFn, page_size: int) -> str:
    """A mask that selects pages, alone or beside what is always seen."""
    page = draw(st.sampled_from([size for size in (1, 2, 4, 8, 16) if page_size % size == 0]))
    options = [f"page={page}", f"score={draw(st.sampled_from(['minmax', 'mean', 'keys']))!r}"]
    options += [f"group={draw(st.sampled_from(['max', 'mean', 'sum']))!r}", f"every={draw(st.sampled_from([1, 1, 2, 3]))}"]
    if draw(st.booleans()):
        options.append("share=0")
    chosen = f"page_topk({draw(st.integers(4, 40))}, {', '.join(options)})"
    if draw(st.booleans()):
        chosen = f"(sink({draw(small)}) | sliding_window({draw(small)}) | {chosen})"
    return f"causal & {chosen}"


@st.composite
def _by_head(draw: st.DrawFn, model: Model, mask: SearchStrategy[str]) -> str:
    heads = [model.heads, model.heads if model.kind == "gpt2" else model.kv_heads]
    size = draw(st.sampled_from([*heads, *heads, *heads, 3]))
    return f"per_head([{', '.join(draw(st.lists(mask, min_size=size, max_size=size)))}])"


@st.composite
def policies(draw: st.DrawFn, model: Model, cache: Cache, rows: int) -> str:
    """A policy of any form. Everything selects pages, streams, or is a random mask."""
    if cache.cache_positions:
        mask: SearchStrategy[str] = streaming
    else:
        family = draw(st.sampled_from(["streaming", "random", "random", "pages"]))
        one = {"streaming": streaming, "random": masks(rows), "pages": selections(cache.page_size)}[family]
        mask = st.one_of(one, st.just("causal"), streaming) if family == "pages" else one
    whole = st.one_of(mask, mask, _by_head(model, mask))
    keys = st.sampled_from(["0", "1", "range(1, 2)", "range(0, 3)", '"*.0.*"'] if draw(st.integers(0, 5)) == 0 else ["0", "1"])
    match draw(st.sampled_from(["mask", "mask", "layers", "prefill", "decode", "phases"])):
        case "mask":
            return draw(whole)
        case "layers":
            return f"Policy({draw(whole)}, layers={{{draw(keys)}: {draw(whole)}}})"
        case "prefill":
            return f"Policy(prefill={draw(whole)})"
        case "decode":
            return f"Policy(decode={draw(whole)})"
        case _:
            return f"Policy(prefill={draw(whole)}, decode=Policy({draw(whole)}, layers={{{draw(keys)}: {draw(whole)}}}))"


# -- models, caches and calls ---------------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn, kinds: tuple[str, ...]) -> Model:
    """A kind of model with any head counts, groups and window."""
    kind = draw(st.sampled_from(kinds))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 2), (2, 2), (3, 2)]))
    window = draw(st.integers(1, 24)) if kind in WINDOWED else None
    if kind == "gpt2":
        kv_heads, group = kv_heads * group, 1
    layers = 2 if kind == "gemma3_text" else draw(st.sampled_from([1, 2, 2, 2, 3]))
    return Model(kind, kv_heads * group, kv_heads, layers, window)


@st.composite
def caches(draw: st.DrawFn) -> Cache:
    """A cache of any kind, a ``SparseCache`` in every second case."""
    kind = draw(st.sampled_from(["none", "dynamic", "static", "lent", "sparse", "sparse", "sparse", "sparse"]))
    if kind != "sparse":
        return Cache(kind, page_size=64)
    moves = draw(st.integers(0, 7)) == 0
    return Cache(
        kind,
        max_length=draw(st.sampled_from([128, 128, 100, 61])),
        page_size=draw(st.sampled_from([1, 4, 8, 16, 64])),
        rollback=draw(st.sampled_from([0, 0, 3, 9])),
        # The documentation does not say which positions a relaxed chunk has in the cache.
        mode="strict" if moves or draw(st.integers(0, 7)) else "chunk_relaxed",
        cache_positions=moves,
        kv=None if draw(st.integers(0, 2)) else draw(st.sampled_from(["int8", "int4", "fp8"])),
        alone=draw(st.integers(0, 7)) == 0,
    )


@st.composite
def calls(draw: st.DrawFn, cache: Cache, model: Model) -> tuple[Call, ...]:
    """A sequence of calls that makes sense for the cache: a prompt first, and another one after every reset."""
    rows = draw(st.integers(1, 3))
    made: list[Call] = [draw(_prompts(rows))]
    if cache.kind == "none":
        return (*made, *(draw(_prompts(rows)) for _ in range(draw(st.integers(0, 1)))))
    if cache.kind == "lent":
        implementation = draw(st.sampled_from([None, None, None, "dynamic", "static"]))
        made.append(Generate(draw(st.integers(2, 6)), implementation))
        return (*made, draw(_prompts(rows)), Generate(3, implementation)) if draw(st.booleans()) else tuple(made)
    kinds = {
        "dynamic": ["chunk", "steps", "steps", "select"],
        "static": ["chunk", "steps", "steps", "reset"],
        "sparse": ["chunk", "steps", "steps", "steps", "select", "reset", "crop", "crop", "trip", "reload", "generate"],
    }[cache.kind]
    for _ in range(draw(st.integers(1, 4))):
        match draw(st.sampled_from(kinds)):
            case "chunk":
                made.append(Chunk(draw(st.integers(2, 20))))
            case "steps":
                made.append(Steps(draw(st.integers(1, 6))))
            case "select":
                chosen = draw(st.lists(st.integers(0, rows - 1), min_size=cache.kind != "sparse", max_size=3))
                made.append(Select(tuple(chosen)))
                rows = len(chosen)
            case "reset":
                made += [Reset(), draw(_prompts(rows))]
            case "crop":
                made.append(Crop(draw(st.integers(1, 9))))
            case "trip":
                made.append(Trip(draw(st.sampled_from([1, 1, 5])), model.layers - 1))
            case "reload":
                made.append(Reload(draw(st.sampled_from([cache.max_length, 128, 160]))))
            case _:
                made.append(Generate(draw(st.integers(2, 4))))
        if not rows:  # nothing is left of the text
            rows = draw(st.integers(1, 3))
            made.append(draw(_prompts(rows)))
    return tuple(made)


@st.composite
def _prompts(draw: st.DrawFn, rows: int) -> Prompt:
    length = draw(st.integers(2, 40))
    is_padded = draw(st.booleans())
    pads = [draw(st.integers(0, length - 1)) if is_padded else 0 for _ in range(rows)]
    return Prompt(length, tuple(pads))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case."""
    cache = draw(caches())
    model = draw(models(PLAIN_ROTARY if cache.cache_positions else KINDS if cache.mode == "strict" else ("llama", "gpt2")))
    made = draw(calls(cache, model))
    rows = next(len(call.pads) for call in made if isinstance(call, Prompt))
    generates = any(isinstance(call, Generate) for call in made)
    return Case(
        draw(policies(model, cache, rows)),
        made,
        model,
        cache,
        spelled=draw(st.booleans()),
        entry="compile" if generates else draw(st.sampled_from(["compile", "compile", "backend"])),
        dynamic=draw(st.sampled_from([None, None, None, True])),
        seed=draw(st.integers(0, 9)),
    )
