"""Find out about a model: its attention modules, those that no row of a report covers, and whether it has a text decoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_compile.report import Report


def attention_modules(model: nn.Module) -> list[str]:
    """The paths of the innermost modules whose class is named after attention and that hold parameters.

    transformers names them so: ``BertSelfAttention`` within ``BertAttention``, ``LlamaAttention``, ``T5Attention``.
    """
    named = {path: module for path, module in model.named_modules() if _is_attention(module)}
    return [
        path
        for path, module in named.items()
        if not any(_is_attention(part) for part in module.modules() if part is not module)
    ]


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return ("attention" in name or "attn" in name) and next(module.parameters(), None) is not None


def without_rows(model: nn.Module, report: Report) -> list[str]:
    """The attention modules that have no row in ``report``.

    The list is empty if Dynamo recorded other paths than those of the model, as it does behind a graph break.
    """
    expected = attention_modules(model)
    seen = {site.module for site in report.sites}
    behind_a_break = not seen <= set(dict(model.named_modules())) or ("" in seen and "" not in expected)
    missing = [path for path in expected if not any(f"{site}.".startswith(f"{path}.") for site in seen)]
    return [] if behind_a_break else missing


def has_decoder(model: nn.Module) -> bool:
    """Whether a transformers model consists of a text decoder and other parts, such as a vision tower."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return False
    return bool(config.is_encoder_decoder) or config.get_text_config(decoder=True) is not config
