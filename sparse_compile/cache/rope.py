"""Measure the rotary position embedding of a model by running its code: which dimensions rotate together, and how fast."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.passes.ops.cache.rope_positions import rotate
from sparse_compile.passes.storage.layer_plan import LayerPlan

FIND = (
    "cache_positions=True rotates keys, so it needs a model with rotary position embeddings whose module in transformers "
    "defines a RotaryEmbedding class and apply_rotary_pos_emb"
)


@dataclass(frozen=True)
class Rotation:
    """A rotation of pairs of dimensions, with one frequency per pair in radians per position.

    ``interleaved`` pairs are neighbors (GPT-J). Otherwise the first half of the dimensions pairs with the second (Llama).
    Dimensions beyond the pairs do not rotate.
    """

    frequencies: tuple[float, ...]
    interleaved: bool

    @staticmethod
    def of(config: Any, layer: int, dim: int) -> Rotation:
        """Measure how a layer rotates keys of ``dim`` dimensions. Raises ``ValueError`` if there is no rotation of pairs."""
        config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        embedding, apply = _code_of(config)
        kinds = getattr(config, "layer_types", None)
        kind = (kinds[layer],) if kinds and "layer_type" in inspect.signature(embedding.forward).parameters else ()

        def turned(x: Tensor, position: int) -> Tensor:
            """Rotate the rows of ``x`` ``[n, dim]`` as queries at one position, without the scaling that some models add."""
            at = torch.full((1, x.shape[0]), position)
            cos, sin = embedding(x, at, *kind)
            result: Tensor = apply(x[None, None], x[None, None], cos, sin)[0][0, 0]
            length: Tensor = x.norm(dim=-1, keepdim=True) / result.norm(dim=-1, keepdim=True)
            return result * length

        by_one = turned(torch.eye(dim), 1)  # row i: the image of unit vector i
        beside, partner = (by_one - by_one.diagonal().diag()).abs().max(dim=1)
        pairs = int((beside > 0).sum()) // 2
        interleaved = pairs > 0 and int(partner[0]) == 1 and pairs > 1
        first = torch.arange(pairs) * 2 if interleaved else torch.arange(pairs)
        angles = torch.atan2(by_one[first, partner[first]], by_one[first, first])
        known = [b.double() for name, b in embedding.named_buffers() if name.endswith("inv_freq") and b.numel() == pairs]
        # Prefer the model's own frequencies, by which it multiplies positions: measured angles equal them only up to rounding.
        exact = next((b for b in known if torch.allclose(b, angles.double(), rtol=1e-4, atol=1e-9)), angles.double())
        rotation = Rotation(tuple(exact.tolist()), interleaved)
        sample = torch.randn(4, dim, generator=torch.Generator().manual_seed(0))
        again = rotate(turned(sample, 2)[None, None], torch.full((1, 4), 3), exact, interleaved=interleaved)[0, 0]
        if pairs == 0 or not torch.allclose(again, turned(sample, 5), atol=1e-4):
            raise ValueError(f"{FIND}; the embedding of {type(config).__name__} does not rotate dimensions in pairs")
        return rotation


def in_cache_positions(
    plans: tuple[LayerPlan, ...], config: Any, dim: int, device: torch.device
) -> tuple[tuple[LayerPlan, ...], list[Tensor | None]]:
    """Return the plans for queries at cache positions instead of text positions, and the rotary frequencies of each layer.

    Raises ``ValueError`` if some head keeps every key under the policy, and if the model's rotation is not found.
    """
    for plan in plans:
        if any(storage.holds_every_key for storage in plan.storages):
            raise ValueError(
                f"cache_positions=True needs a policy under which every head drops keys, but layer {plan.layer} keeps every "
                "key: use policies.streaming_llm, or leave cache_positions out"
            )
    rotations = [Rotation.of(config, plan.layer, dim) for plan in plans]
    tensors = {r: torch.tensor(r.frequencies, dtype=torch.float64, device=device) for r in rotations}
    turning = tuple(
        replace(plan, rotation="neighbors" if r.interleaved else "halves") for plan, r in zip(plans, rotations, strict=True)
    )
    return turning, [tensors[r] for r in rotations]


def _code_of(config: Any) -> tuple[nn.Module, Any]:
    name = type(config).__module__.replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(name)
    except ImportError as missing:
        raise ValueError(f"{FIND}; {name} cannot be imported") from missing
    apply = getattr(module, "apply_rotary_pos_emb", None)
    classes = [c for n, c in vars(module).items() if n.endswith("RotaryEmbedding") and isinstance(c, type)]
    if apply is None or not classes:
        raise ValueError(f"{FIND}; {name} does not define both")
    embedding: nn.Module = classes[0](config)
    return embedding, apply
