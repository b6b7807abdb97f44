"""Measure how much attention a page selection keeps in each layer: its mass beside that of the best possible keys."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparse_compile.masks import Mask, causal
from sparse_compile.masks.selection.page_topk import GROUPS, SCORES, PageTopK


@dataclass(frozen=True)
class Recall:
    """Shares of the attention of one layer, as means over heads and queries.

    ``chosen`` is the share on the selected keys. ``best`` is the share on the same number of keys if each head selects the keys
    with the most attention.
    """

    layer: int
    chosen: float
    best: float

    @property
    def recall(self) -> float:
        """The attention on the selected keys, as a share of that on the best keys."""
        return self.chosen / self.best


def recall(model: Any, ids: Tensor, selector: PageTopK, *, page_size: int = 64, queries: int = 64) -> list[Recall]:
    """Measure what decode steps under ``selector`` see of ``ids`` ``[1, N]``, at ``queries`` positions of its second half.

    This works for every transformers model whose attention function can be replaced. ``ids`` must be longer than the budget,
    because otherwise every key is selected.
    """
    recalls: list[Recall] = []
    length = ids.shape[1]
    positions = torch.linspace(length // 2, length - 1, min(queries, length - length // 2)).long().unique().tolist()

    def observe(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
    ) -> Any:
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        shares = [_shares(q[:, :, at : at + 1], k[:, :, : at + 1], scale, causal & selector, page_size) for at in positions]
        chosen, best = (sum(side) / len(side) for side in zip(*shares, strict=True))
        recalls.append(Recall(module.layer_idx, chosen, best))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    with _attending(model, observe), torch.no_grad():
        model(ids, use_cache=False)
    return recalls


def _shares(q: Tensor, k: Tensor, scale: float, mask: Mask, page_size: int) -> tuple[float, float]:
    at, heads = k.shape[2] - 1, q.shape[1]
    seen = mask.selected(q, k, q_offset=at, page_size=page_size).dense(1, at + 1, q_offset=at, heads=heads, device=q.device)
    scores = q.float() @ k.float().repeat_interleave(heads // k.shape[1], dim=1).transpose(-1, -2)
    mass = (scores * scale).softmax(dim=-1)
    count = int(seen[0, 0].sum())
    return float((mass * seen).sum(-1).mean()), float(mass.topk(count, dim=-1).values.sum(-1).mean())


@contextmanager
def _attending(model: Any, function: Any) -> Iterator[None]:
    """Replace the attention of ``model`` by ``function``, and restore it afterwards."""
    AttentionInterface.register("sparse_compile_observe", function)
    before = model.config._attn_implementation
    model.set_attn_implementation("sparse_compile_observe")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def load(path: Path) -> Any:
    """Load the model of a folder, or build one with random weights from a config."""
    if path.is_dir() and any(path.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(path).eval()
    factory: Any = AutoModelForCausalLM
    return factory.from_config(AutoConfig.from_pretrained(path)).eval()


def token_ids(path: Path, text: str, vocabulary: int) -> Tensor:
    """Turn a text into ids ``[1, N]`` with the tokenizer of a model's folder, or from its bytes if there is no tokenizer."""
    if (path / "tokenizer.json").is_file():
        ids: Tensor = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
        return ids
    return torch.tensor([[byte % vocabulary for byte in text.encode()]])


def main() -> None:
    """Run ``python -m bench.recall MODEL TEXT``: print a line for each layer and write ``recall.csv``."""
    parser = argparse.ArgumentParser(prog="bench.recall", description=__doc__)
    parser.add_argument("model", type=Path, help="a transformers folder, or a config.json (random weights)")
    parser.add_argument("text", type=Path, help="a text file, longer than the budget")
    parser.add_argument("--tokens", type=int, default=1024, help="budget: keys that each query reads (default: 1024)")
    parser.add_argument("--page", type=int, default=16, help="keys in one page summary (default: 16)")
    parser.add_argument("--page-size", type=int, default=64, help="keys in one page of the cache (default: 64)")
    parser.add_argument("--score", choices=SCORES, default="minmax")
    parser.add_argument("--group", choices=GROUPS, default="max")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the text to use (default: 8192)")
    parser.add_argument("--out", type=Path, default=Path("recall.csv"))
    arguments = parser.parse_args()
    model = load(arguments.model)
    text = arguments.text.read_text("utf-8")
    ids = token_ids(arguments.model, text, model.config.vocab_size)[:, : arguments.length]
    selector = PageTopK(arguments.tokens, page=arguments.page, score=arguments.score, group=arguments.group)
    rows = recall(model, ids, selector, page_size=arguments.page_size)
    print(f"{selector}, pages of {arguments.page_size}, {ids.shape[1]} tokens of {arguments.text}")
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*(field.name for field in fields(Recall)), "recall"])
        for row in rows:
            print(f"layer {row.layer}: {row.chosen:.1%} of the attention (best keys: {row.best:.1%}), recall {row.recall:.1%}")
            writer.writerow([*astuple(row), row.recall])


if __name__ == "__main__":
    main()
