"""Run a model up to its last hidden states, which calibration uses: everything before the vocabulary projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.dynamo import Backend

Hidden = Callable[[nn.Module, Tensor], Tensor]


def last_hidden(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the last hidden states ``[B, N, hidden]`` of a transformers decoder that runs without a cache."""
    find = getattr(model, "get_decoder", None)
    decoder: Any = find() if find is not None else getattr(model, "base_model", model)
    hidden: Tensor = decoder(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def compiled_hidden(model: nn.Module, hidden: Hidden, backend: Backend) -> Callable[[Tensor], Tensor]:
    """Compile ``hidden(model, tokens)`` with ``backend``. Raises ``ValueError`` if an attention call was not recognized."""

    def run(tokens: Tensor) -> Tensor:
        return hidden(model, tokens)

    # Dynamo limits recompiles per code object. A fresh one keeps this calibration from using up the limit of the next.
    own = FunctionType(run.__code__.replace(), run.__globals__, "hidden", None, run.__closure__)
    compiled: Callable[[Tensor], Tensor] = torch.compile(own, backend=backend)

    def checked(tokens: Tensor) -> Tensor:
        out = compiled(tokens)
        left = [f"{site.module}: {site.reason}" for site in backend.report.sites if site.action == "left"]
        if left:
            raise ValueError(
                f"{len(left)} attention calls were not recognized, so their heads have no scores: {'; '.join(left)}"
            )
        return out

    return checked


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode without trainable weights, and restore both on exit."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for weight in trained:
            weight.requires_grad_(True)


def positions_of(config: Any) -> int | None:
    """The number of positions that a model was made for, or None if its config does not say."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return next((int(value) for name in names if isinstance(value := getattr(config, name, None), int)), None)


def sizes_of(model: nn.Module) -> Any:
    """The text config of a transformers model. Raises ``ValueError`` for a model without one."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError("calibration needs model.config, from which layers and KV heads are read: give a transformers model")
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
