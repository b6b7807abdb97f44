"""The demo: run a small Llama with random weights on real text, exact and sparse, on any machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, sink, sliding_window
from sparse_compile.masks.optional_packages import needed

POLICY = causal & (sink(4) | sliding_window(256))
LAYERS, HEADS, KV_HEADS = 4, 8, 4
RUNS = 3


def run_demo(text: Path | None, tokens: int, picture: Path) -> None:
    """Run everything that the library does once, and print real numbers."""
    ids = read_bytes(text, tokens)
    model = build_model(ids.shape[1])
    print(f"A Llama with random weights: {LAYERS} layers, {HEADS} query heads over {KV_HEADS} KV heads, fp32, on CPU.")
    stock = torch.compile(model)
    exact_backend, sparse_backend = sc.Backend(), sc.Backend(POLICY)
    exact = torch.compile(model, backend=exact_backend, dynamic=False)
    sparse = torch.compile(model, backend=sparse_backend, dynamic=False)

    print("\n1. Exact: torch.compile(model, backend=sparse_compile.backend)")
    reference = run("eager", model, ids)
    logits = run("sparse_compile, exact", exact, ids)
    error = float((logits - reference).abs().max() / reference.abs().max())
    print(f"   largest difference of a logit from the eager model: {error:.1e} of the largest logit")
    print(exact_backend.report)

    print(f"\n2. Sparse: the same with options={{'policy': {POLICY}}}")
    run("sparse_compile, sparse", sparse, ids)
    print(sparse_backend.report)
    visible = POLICY.density(1, tokens, q_offset=tokens - 1) * tokens
    pairs = 100 * POLICY.density(tokens, tokens)
    print(f"   KV entries the last token sees: {visible:.0f} of {tokens}; visible pairs: {pairs:.1f} %")
    print("   (the weights are random, so this says nothing about quality: a policy removes keys, so it is lossy)")

    print("\n3. Time of one forward pass, after warm-up (best of 3)")
    run("torch.compile, stock", stock, ids)
    for name, fast in (("eager", model), ("torch.compile", stock), ("ours, exact", exact), ("ours, sparse", sparse)):
        print(f"   {name:<14} {best_time(fast, ids):8.3f} s")

    print("\n4. The pattern, small")
    small: Mask = causal & (sink(2) | sliding_window(6))
    print(f"   {small}")
    print("\n".join(f"   {line}" for line in small.draw(16, 16).splitlines()))
    save_picture(picture, tokens)


def read_bytes(text: Path | None, tokens: int) -> Tensor:
    """The first ``tokens`` bytes of a file as token ids ``[1, tokens]``."""
    path = text or find_license()
    content = path.read_bytes()
    if len(content) < tokens:
        raise ValueError(f"{path} has {len(content)} bytes, fewer than --tokens {tokens}: name a longer --text")
    print(
        f"Text: the first {tokens} bytes of {path.name}, beginning {' '.join(content[:60].decode(errors='replace').split())!r}"
    )
    return torch.frombuffer(bytearray(content[:tokens]), dtype=torch.uint8).long().unsqueeze(0)


def find_license() -> Path:
    """The path of the license text, in the checkout or in the installed package."""
    checkout = Path(__file__).resolve().parent.parent / "LICENSE"
    if checkout.exists():
        return checkout
    try:
        installed = next(file for file in files("sparse-compile") or [] if file.name == "LICENSE")
    except (PackageNotFoundError, StopIteration):
        raise ValueError("the license text was not found: name a file with --text") from None
    return Path(str(installed.locate()))


def build_model(length: int) -> torch.nn.Module:
    """A Llama over bytes, with the same random weights every time."""
    with needed("the demo", "transformers"):
        from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=length,
        use_cache=False,
    )
    model: torch.nn.Module = LlamaForCausalLM(config)
    return model.eval()


def run(name: str, model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Run one forward pass, and print what is compiled and how long this first call took."""
    print(f"   {name}: first call ...", end=" ", flush=True)
    start = time.perf_counter()
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
    return logits


def best_time(model: Callable[..., Any], ids: Tensor) -> float:
    """The time of the fastest of a few forward passes, in seconds."""
    times = []
    with torch.no_grad():
        for _ in range(RUNS):
            start = time.perf_counter()
            model(ids)
            times.append(time.perf_counter() - start)
    return min(times)


def save_picture(path: Path, tokens: int) -> None:
    """Draw the policy to a file if matplotlib is installed."""
    try:
        figure = POLICY.plot(min(tokens, 2048), min(tokens, 2048))
    except ImportError as missing:
        print(f"   no picture: {missing}")
        return
    figure.savefig(path, dpi=120)
    print(f"   picture: {path}")
