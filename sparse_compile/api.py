"""The functions that users call: compile a model in place, explain it, or pass the backend to ``torch.compile``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from sparse_compile.attention_modules import has_decoder
from sparse_compile.compiled_call import CompiledCall
from sparse_compile.dynamo import Backend, Hooks, SparseCompileWarning
from sparse_compile.generation import REPLACED, Generation, generating
from sparse_compile.masks import Mask
from sparse_compile.passes import torch_private
from sparse_compile.policy import Policy
from sparse_compile.report import Report


def backend(
    gm: GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one graph for ``torch.compile(model, backend=sparse_compile.backend)``: exactly, or under a policy.

    ``options`` may hold ``policy``, ``inner``, ``kernel``, ``strict`` and ``inductor``, as in ``Backend``. Use ``Backend``
    instead if you want the report.
    """
    return Backend()(gm, inputs, mode=mode, options=options)


def compile(
    model: nn.Module,
    policy: Policy | Mask | None = None,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    cache: Mapping[str, Any] | None = None,
    prefill_chunk_size: int | None = 8192,
    **backend_options: Any,
) -> Any:
    """Compile ``model`` in place and return it, so that ``model.generate()`` runs compiled too.

    ``torch.compile(model).generate()`` would silently run un-compiled. The options are those of ``Backend``, and the report is
    ``model.sparse_compile_report``.

    ``generate()`` makes a ``SparseCache`` for the policy where transformers would make a ``DynamicCache``, and reuses its
    memory in the next call. ``cache`` has the options of these caches, such as ``{"kv": "int8"}``; so does ``cache_config`` of
    ``generate``. ``model.sparse_cache(max_length=...)`` makes one for calls of your own. Prompts of more than
    ``prefill_chunk_size`` tokens, all sequences together, run in chunks; None runs them whole. On CUDA, decode steps run as
    CUDA graphs; ``mode="default"`` turns that off.

    Copies of the model, also by ``pickle``, run un-compiled and have no report, so copying warns with
    ``SparseCompileWarning``. So does a call if Dynamo gives up on the model and runs it un-compiled, or if a policy reaches no
    attention call; with ``strict=True``, these raise ``SparseCompileError``. Attention modules without a row in the report warn
    as well. Raises ``ValueError`` if the policy names layers or heads that the model does not have, or
    if ``cache`` is given for a model without ``generate``.

        >>> model = sc.compile(model, causal & (sink(4) | sliding_window(64)), inner="eager")
        >>> model.generate(tokens, max_new_tokens=2).shape
        torch.Size([1, 10])
    """
    options = torch_private.compiles_often()
    sizes = _sizes_of(model)
    hooks = Hooks(
        isolated=bool(options),
        limit=options.get("recompile_limit"),
        has_decoder=has_decoder(model),
        model_heads=sizes[1:] if sizes else None,
    )
    chosen = Backend(policy, hooks=hooks, **backend_options)
    if chosen.policy is not None:
        check_policy(chosen.policy, model)
    inner = generating(model)
    if cache and inner is None:
        raise ValueError(
            f"cache has options for the caches of generate(), and {type(model).__name__} has no generate() of transformers: "
            "leave cache out, and pass the options to SparseCache"
        )
    for module in {model, inner or model}:
        module.compile(backend=chosen, mode=mode, dynamic=dynamic, **options)
        run = torch_private.compiled_call(module)
        assert run is not None
        torch_private.set_compiled_call(module, CompiledCall(run, module, chosen, prefill_chunk_size))
    if chosen.inner == "inductor" and any(weight.device.type == "cuda" for weight in model.parameters()):
        torch_private.start_compile_workers()
    if inner is not None:
        Generation(inner, chosen, dict(cache or {})).install()
    object.__setattr__(model, "sparse_compile_report", chosen.report)
    for module in {model, inner or model}:
        object.__setattr__(module, "__getstate__", partial(_state_of_copy, module))
    return model


def _state_of_copy(model: nn.Module) -> dict[str, Any]:
    """The state from which ``copy`` and ``pickle`` build a copy of a compiled model, without the report of the original.

    A module does not copy its compiled function, so a copy runs un-compiled, and a report on it would be wrong.
    """
    message = (
        f"a copy of a compiled {type(model).__name__} runs un-compiled, without sparse_compile and without its policy: "
        "call sparse_compile.compile on the copy"
    )
    warnings.warn(message, SparseCompileWarning, stacklevel=2)
    state: Any = type(model).__getstate__(model)
    return {name: value for name, value in state.items() if name not in ("sparse_compile_report", "__getstate__", *REPLACED)}


def check_policy(policy: Policy, model: nn.Module) -> None:
    """Raise ``ValueError`` if the policy names layers or heads that a transformers model does not have."""
    sizes = _sizes_of(model)
    if sizes is not None:
        policy.check(*sizes)


def _sizes_of(model: nn.Module) -> tuple[int, int, int] | None:
    """The numbers of layers, query heads and KV heads in the config of a transformers model; None if it does not have them."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not (isinstance(layers, int) and isinstance(heads, int)):
        return None
    kv_heads = getattr(config, "num_key_value_heads", None)
    return layers, heads, kv_heads if isinstance(kv_heads, int) else heads


def explain(
    model: nn.Module, *args: Any, policy: Policy | Mask | None = None, device: str | None = None, **kwargs: Any
) -> Report:
    """Run ``model(*args, **kwargs)`` once through the passes, without code generation, and return the report.

    The report lists the kernels that ``Backend(policy)`` would use, on ``device`` (``"cpu"`` or ``"cuda"``; by default the
    model's own). The model itself runs on the dense reference without gradients, and stays un-compiled. A cache in the
    arguments takes the tokens, as in any run. Raises like ``Backend``.

        >>> report = sc.explain(model, tokens, policy=causal & sliding_window(4))
        >>> [site.action for site in report.sites]
        ['sparse', 'sparse']
    """
    chosen = planner(policy, model, device)
    # Each explanation is a separate backend; before torch 2.13 it would use up the recompiles of the model's code.
    with torch.no_grad(), torch_private.without_recompile_limit():
        run = torch.compile(model, backend=chosen, **torch_private.compiles_often())
        CompiledCall(run, model, chosen, chunk=None)(*args, **kwargs)
    return chosen.report


def planner(policy: Policy | Mask | None, model: nn.Module, device: str | None = None) -> Backend:
    """Return a backend that reports what ``Backend(policy)`` would do, but runs the dense reference."""
    sizes = _sizes_of(model)
    hooks = Hooks(
        dry=True,
        device=device,
        isolated=torch_private.isolates_recompiles(),
        has_decoder=has_decoder(model),
        model_heads=sizes[1:] if sizes else None,
    )
    chosen = Backend(policy, hooks=hooks)
    if chosen.policy is not None:
        check_policy(chosen.policy, model)
    return chosen
