"""Attention without a model over a quantized cache, compared with attention that is written out, on text in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

import sparse_compile as sc
from sparse_compile.cache.kv_format import ByLayer
from sparse_compile.masks import causal
from sparse_compile.passes.storage.codec import QuantizedTensor, quantize
from sparse_compile.passes.storage.layer_plan import PageStorage, quantized_of
from support.models import SMALL
from support.oracles import formats as format_oracle
from support.oracles.cache import error
from support.oracles.selection import Head, Oracle, PageSelection
from support.sessions.selection import policy_of

DIM, LAYERS = 16, 2


class Text(NamedTuple):
    """Queries ``[layers, B, Hq, N, D]``, keys and values ``[layers, B, Hkv, N, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor

    def at(self, start: int, stop: int | None = None) -> Text:
        """The tokens from ``start`` up to, but not including, ``stop``."""
        return Text(*(x[..., start:stop, :] for x in self))

    def then(self, more: Text) -> Text:
        """This text followed by other tokens."""
        return Text(*(torch.cat(pair, dim=3) for pair in zip(self, more, strict=True)))

    def rows(self, rows: Tensor) -> Text:
        """The rows with these indices."""
        return Text(*(x[:, rows] for x in self))


def random_text(length: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 2, seed: int = 1, **sizes: int) -> Text:
    """Random numbers for which attention is selective. Some key channels are larger, and some are far from zero."""
    generator, dim = torch.Generator().manual_seed(seed), sizes.get("dim", DIM)
    shape = sizes.get("layers", LAYERS), batch
    q, k, v = (torch.randn(*shape, n, length, dim, generator=generator) for n in (heads, kv_heads, kv_heads))
    return Text(q, k * torch.linspace(0.5, 2.5, dim) + torch.linspace(-2, 2, dim), v)


class Layer(nn.Module):
    """The part of a transformers layer between its projections."""

    def __init__(self, number: int, window: int | None) -> None:
        super().__init__()
        self.number, self.window = number, window

    def forward(self, text: Text, cache: Any, padding: Tensor | None) -> Tensor:
        at = (torch.arange(text.q.shape[3]) + cache.get_query_offset())[:, None]
        k, v = cache.update(text.k[self.number], text.v[self.number], self.number)
        keys = torch.arange(k.shape[2])
        seen = keys <= at if self.window is None else (keys <= at) & (keys > at - self.window)
        seen = seen[None, None] if padding is None else seen[None, None] & padding[:, None, None, :]
        return scaled_dot_product_attention(text.q[self.number], k, v, attn_mask=seen, enable_gqa=True)


class Attention(nn.Module):
    """The attention layers of a model without the rest; ``windows`` are their sliding windows."""

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(number, window) for number, window in enumerate(windows))

    def forward(self, text: Text, cache: Any, padding: Tensor | None = None) -> Tensor:
        return torch.stack([layer(text, cache, padding) for layer in self.layers])


class Session:
    """Attention compiled for these KV heads with a cache in ``kv``, and the same attention over the dequantized numbers."""

    def __init__(
        self,
        kv: ByLayer,
        layers: list[list[Head]] | None = None,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        windows: Sequence[int | None] = (None,) * LAYERS,
        head_dim: int = DIM,
        **options: Any,
    ) -> None:
        kinds = ["sliding_attention" if window else "full_attention" for window in windows]
        sizes: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
        sizes |= {"num_hidden_layers": len(windows), "layer_types": kinds, "sliding_window": max(w or 0 for w in windows)}
        torch._dynamo.reset()  # otherwise graphs of other sessions count for this one
        self.config = LlamaConfig(**{**SMALL, **sizes})
        self.options = {"page_size": 32, "max_length": 96, "kv": kv, **options}
        layers = layers or [[causal]] * len(windows)
        prefill: list[list[Head]] = [[h.base if isinstance(h, PageSelection) else h for h in layer] for layer in layers]
        self.policy, self.windows = policy_of(layers, prefill), windows
        self.oracle = Oracle(layers, page_size=self.options["page_size"], prefill=prefill)
        self.backend = sc.Backend(self.policy, inner="eager")
        self.model: Any = torch.compile(Attention(windows), backend=self.backend)
        self.cache = self.another()
        self.held: Text | None = None

    def another(self, **options: Any) -> sc.SparseCache:
        return sc.SparseCache(self.config, self.policy, **{**self.options, **options})

    def reset(self) -> None:
        self.cache.reset()
        self.oracle.reset()
        self.held = None

    def crop(self, remove: int) -> None:
        assert self.held is not None
        self.cache.crop(-remove)
        self.oracle.padding = self.oracle.padding[:, :-remove]
        self.oracle.forget_scores()
        self.held = self.held.at(0, -remove)

    def feed(self, text: Text, lengths: Sequence[int] | None = None, padding: Tensor | None = None) -> Tensor:
        """The library's attention output ``[layers, B, Hq, N, D]``; ``padding`` covers all columns."""
        outs = []
        for piece in zip(*(x.split(list(lengths or [text.q.shape[3]]), dim=3) for x in text), strict=True):
            with torch.no_grad():
                # Clone, because Dynamo compiles again for other strides.
                outs.append(self.model(Text(*(x.clone() for x in piece)), self.cache, padding))
        return torch.cat(outs, dim=3)

    def goes_as_written_out(self, text: Text, lengths: Sequence[int] | None = None, padding: Tensor | None = None) -> Tensor:
        """Feed the text, and assert that each piece equals attention to the numbers that the cache holds after it."""
        outs, start = [], 0
        for length in lengths or [text.q.shape[3]]:
            piece = text.at(start, start + length)
            got, wanted = self.feed(piece, padding=padding), self.written_out(piece, padding)
            begin = self.oracle.padding.shape[1] - length
            shown = self.oracle.padding[:, begin:].bool()
            assert error(got.transpose(2, 3)[:, shown], wanted.transpose(2, 3)[:, shown]) < 1e-5, (start, length)
            outs.append(got)
            start += length
        return torch.cat(outs, dim=3)

    def written_out(self, piece: Text, padding: Tensor | None = None) -> Tensor:
        """Dense attention of new tokens that are already in the cache."""
        self.held = piece if self.held is None else self.held.then(piece)
        (batch, _, length), columns = piece.q.shape[1:4], self.held.k.shape[3]
        new = torch.ones(batch, length, dtype=torch.int64) if padding is None else padding[:, columns - length : columns].long()
        held = self.oracle.padding if self.oracle.padding.shape[1] else new[:, :0]
        self.oracle.padding = torch.cat([held, new], dim=1)
        if length > 1:
            self.oracle.forget_scores()
        return torch.stack([self._layer(layer, piece) for layer in range(len(self.windows))])

    def _layer(self, layer: int, piece: Text) -> Tensor:
        assert self.held is not None
        q, raw, length = piece.q[layer].double(), self.held.k[layer], piece.q.shape[3]
        k, v = self.decoded(layer)
        seen = self.oracle.visible(layer, q, k if self.by_keys(layer) else raw)
        window = self.windows[layer]
        if window is not None:
            column = torch.arange(raw.shape[2])
            seen &= column > column[-length:, None] - window
        if length > 1:
            k[:, :, -length:], v[:, :, -length:] = piece.k[layer], piece.v[layer]  # a chunk sees itself unquantized
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) / q.shape[3] ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        out: Tensor = weights @ v.repeat_interleave(group, 1)
        return out.float()

    def by_keys(self, layer: int) -> bool:
        """Whether a layer scores pages by the keys themselves instead of page summaries."""
        found = [s.selection for s in self.cache.cached_layers[layer].plan.storages if isinstance(s, PageStorage)]
        return any(selection is not None and selection.by_keys for selection in found)

    def decoded(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer as the cache stores them, dequantized to double precision. Rings are unquantized."""
        assert self.held is not None
        numbers = self.held.k[layer].double(), self.held.v[layer].double()
        columns = numbers[0].shape[2]
        for heads, parts, form, which in self.quantized_parts(layer):
            read = format_oracle.read([part[: numbers[0].shape[0]] for part in parts], form)
            numbers[which][:, heads] = read[:, :, :columns]
        return numbers

    def quantized_parts(self, layer: int) -> list[tuple[list[int], list[Tensor], Any, int]]:
        """Heads, tensors and format of the quantized keys (0) and values (1) of each storage group of a layer."""
        kept, found = self.cache.cached_layers[layer], []
        for number, storage in enumerate(kept.plan.storages):
            if isinstance(storage, PageStorage) and storage.forms is not None:
                pair = zip(quantized_of(kept.plan, kept.quantized, number), storage.forms, strict=True)
                found += [(list(storage.heads), quantized.used(), form, which) for which, (quantized, form) in enumerate(pair)]
        return found


def bits(cache: sc.SparseCache) -> list[Tensor]:
    """A copy of all quantized data of the columns in use, with scales and offsets."""
    rows = cache.host_state.batch or 0
    return [part.clone() for name, part in cache.parts(rows).items() if "code" in name]


def assert_same_bits(a: sc.SparseCache, b: list[Tensor] | sc.SparseCache) -> None:
    pairs = zip(bits(a), bits(b) if isinstance(b, sc.SparseCache) else b, strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def assert_codes_of_whole_text(session: Session, text: Text, padding: Tensor | None = None) -> None:
    """Assert that each group is quantized as if all of its tokens had been appended at once."""
    columns = text.k.shape[3]
    for layer in range(len(session.windows)):
        for heads, parts, form, which in session.quantized_parts(layer):
            x = (text.k, text.v)[which][layer][:, heads]
            rows, padded = x.shape[0], -(-columns // form.tokens) * form.tokens
            filled = torch.nn.functional.pad(x, (0, 0, 0, padded - columns))
            valid = torch.ones(rows, columns, dtype=torch.bool) if padding is None else padding[:, :columns]
            wanted = quantize(filled, torch.nn.functional.pad(valid, (0, padded - columns)) if form.tokens > 1 else None, form)
            held = QuantizedTensor(*(part[:rows] for part in parts))
            for got, part, tokens in zip(held.used(), wanted.used(), (1, form.tokens, form.tokens), strict=False):
                assert torch.equal(got[:, :, : padded // tokens], part)
