"""How much attention a selection keeps: the mass on the chosen keys beside that of the best, for each layer of a model."""

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
    """Shares of attention, means over heads and queries: on the chosen keys, and on as many that each head chooses exactly."""

    layer: int
    chosen: float
    best: float

    @property
    def recall(self) -> float:
        """What is chosen of what could be."""
        return self.chosen / self.best


def recall(model: Any, ids: Tensor, selector: PageTopK, *, page_size: int = 64, queries: int = 64) -> list[Recall]:
    """What decode steps under ``selector`` would see of ``ids`` ``[1, N]``, at ``queries`` positions of its second half.

    Works for every transformers model whose attention can be exchanged; text beyond the budget is needed to tell anything.
    """
    found: list[Recall] = []
    length = ids.shape[1]
    positions = torch.linspace(length // 2, length - 1, min(queries, length - length // 2)).long().unique().tolist()

    def observe(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
    ) -> Any:
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        shares = [_shares(q[:, :, at : at + 1], k[:, :, : at + 1], scale, causal & selector, page_size) for at in positions]
        chosen, best = (sum(side) / len(side) for side in zip(*shares, strict=True))
        found.append(Recall(module.layer_idx, chosen, best))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    with _attending(model, observe), torch.no_grad():
        model(ids, use_cache=False)
    return found


def _shares(q: Tensor, k: Tensor, scale: float, mask: Mask, page_size: int) -> tuple[float, float]:
    at, heads = k.shape[2] - 1, q.shape[1]
    seen = mask.selected(q, k, q_offset=at, page_size=page_size).dense(1, at + 1, q_offset=at, heads=heads, device=q.device)
    scores = q.float() @ k.float().repeat_interleave(heads // k.shape[1], dim=1).transpose(-1, -2)
    mass = (scores * scale).softmax(dim=-1)
    count = int(seen[0, 0].sum())
    return float((mass * seen).sum(-1).mean()), float(mass.topk(count, dim=-1).values.sum(-1).mean())


@contextmanager
def _attending(model: Any, function: Any) -> Iterator[None]:
    """``model`` with ``function`` in place of its attention."""
    AttentionInterface.register("sparse_compile_observe", function)
    before = model.config._attn_implementation
    model.set_attn_implementation("sparse_compile_observe")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def load(path: Path) -> Any:
    """The model of a folder, or of a config with random weights."""
    if path.is_dir() and any(path.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(path).eval()
    factory: Any = AutoModelForCausalLM
    return factory.from_config(AutoConfig.from_pretrained(path)).eval()


def token_ids(path: Path, text: str, vocabulary: int) -> Tensor:
    """A text as ids ``[1, N]``: by the tokenizer of a model's folder, or its bytes where there is none."""
    if (path / "tokenizer.json").is_file():
        ids: Tensor = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids
        return ids
    return torch.tensor([[byte % vocabulary for byte in text.encode()]])


def main() -> None:
    """``python -m bench.recall MODEL TEXT``: a line for each layer, and ``recall.csv``."""
    parser = argparse.ArgumentParser(prog="bench.recall", description=__doc__)
    parser.add_argument("model", type=Path, help="a transformers folder, or a config.json (random weights)")
    parser.add_argument("text", type=Path, help="a text file, longer than the budget")
    parser.add_argument("--tokens", type=int, default=1024, help="the budget (default: 1024)")
    parser.add_argument("--page", type=int, default=16, help="keys that are described as one (default: 16)")
    parser.add_argument("--page-size", type=int, default=64, help="keys that are read as one (default: 64)")
    parser.add_argument("--score", choices=SCORES, default="minmax")
    parser.add_argument("--group", choices=GROUPS, default="max")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the text (default: 8192)")
    parser.add_argument("--out", type=Path, default=Path("recall.csv"))
    told = parser.parse_args()
    model = load(told.model)
    ids = token_ids(told.model, told.text.read_text("utf-8"), model.config.vocab_size)[:, : told.length]
    selector = PageTopK(told.tokens, page=told.page, score=told.score, group=told.group)
    rows = recall(model, ids, selector, page_size=told.page_size)
    print(f"{selector}, pages of {told.page_size}, {ids.shape[1]} tokens of {told.text}")
    with told.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*(field.name for field in fields(Recall)), "recall"])
        for row in rows:
            print(
                f"layer {row.layer}: {row.chosen:.1%} of the attention, the best keys {row.best:.1%}, recall {row.recall:.1%}"
            )
            writer.writerow([*astuple(row), row.recall])


if __name__ == "__main__":
    main()
